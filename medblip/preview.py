"""`--dry-run N`: samples as the model gets them, so that a person can see what will be trained on."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from medblip.data import INTENSITY_MEAN, INTENSITY_STD, Loader, to_device
from medblip.words import Words


def dry_run(count: int, loader: Loader, grid_size: int, words: Words, seed: int, run: Path) -> int:
    """Prints `count` samples (prompt, query places, answer, which tokens count) and writes their pictures.

    This shows record text on the terminal, on the data owner's request, and nowhere else.

    Returns:
        0, the exit code.
    """
    pictures = run / "dry-run"
    pictures.mkdir(parents=True, exist_ok=True)
    shown = 0
    for host in loader:
        batch = to_device(host, grid_size, torch.device("cpu"), torch.float32, seed)
        questions = len(host.examples) // len(host.samples)
        for row, example in enumerate(host.examples):
            scan = row // questions
            key = batch.keys[scan]
            prompt = words.language.convert_ids_to_tokens(batch.prompt_ids_BT[row][batch.is_prompt_BT[row]].tolist())
            answer = words.language.convert_ids_to_tokens(batch.answer_ids_BA[row][batch.is_answer_BA[row]].tolist())
            queries = "<queries>" if batch.use_queries_B[row] else "(queries left out)"
            print(f"\n--- {key}  cohort {host.samples[scan].cohort}  epoch {host.epochs[scan]}")
            print(_wrapped("prompt", example.prompt))
            print(_wrapped("answer", example.answer or "(none: no language loss)"))
            print(_wrapped("contrasted with", example.record_text or "(no record)"))
            print(_wrapped("tokens", f"{' '.join(prompt)} {queries} [{' '.join(answer)}]  ([ ] = counts in the loss)"))
            path = pictures / f"{key}.png"
            volume_XYZ = batch.volume_BXYZ[scan] * INTENSITY_STD + INTENSITY_MEAN
            _draw(volume_XYZ, path)
            print(_wrapped("volume", f"{path}, values {volume_XYZ.min():.2f} to {volume_XYZ.max():.2f} before scaling"))
            shown += (row + 1) % questions == 0
            if shown == count:
                loader.close()
                return 0
    return 0


def _wrapped(title: str, text: str) -> str:
    return textwrap.fill(f"{title + ':':<17}{text}", width=110, subsequent_indent=" " * 17)


def _draw(volume_XYZ: torch.Tensor, path: Path) -> None:
    from matplotlib import image

    middle = volume_XYZ.shape[0] // 2
    planes = [volume_XYZ[middle], volume_XYZ[:, middle], volume_XYZ[:, :, middle]]
    # Rows run from the top of the head (or the front) downwards.
    image.imsave(path, torch.cat([plane.T.flip(0) for plane in planes], dim=1).numpy(), cmap="gray", vmin=0, vmax=1)
