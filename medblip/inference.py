"""A trained model, loaded to be asked: encode a scan once, then score options or write an answer.

B scans, X Y Z voxels, Q queries, C width, O options.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from medblip import checkpoint
from medblip.config import EhrTier, ModelConfig
from medblip.data import unpack
from medblip.model import MedBLIP
from medblip.shards import Sample
from medblip.text import DIAGNOSIS_ANSWERS, DIAGNOSIS_QUESTION, render_prompt
from medblip.volume import Prepared, Recipe
from medblip.words import build_words


class Assistant:
    """A model with its tokenisers, the recipe its volumes must follow, and what it was trained on.

    Args:
        path: a run folder (its latest checkpoint is taken) or one of its checkpoints.
        device: where to run; a GPU where there is one by default.

    Raises:
        ValueError: if there is no whole checkpoint, or the frozen towers are not those of the training.
    """

    def __init__(self, path: str | Path, device: torch.device | None = None):
        path = Path(path)
        if (path / "state.json").is_file():
            folder, run = path, path.parent.parent
            checkpoint.verify(folder)
        else:
            folder, run = checkpoint.newest_whole(path), path
        if folder is None:
            raise ValueError(f"--model {path}: neither a run folder with a checkpoint nor a checkpoint")
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state = checkpoint.read_state(folder)
        config = ModelConfig(**state["model"])
        self.name = f"{run.name}/{folder.name}"
        self.recipe = Recipe.from_dict(state["recipe"])
        self.ehr: EhrTier = json.loads((run / "config.json").read_text())["train"]["ehr"]
        self.train_subjects = frozenset((run / "train_subjects.txt").read_text().split())
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = MedBLIP(config, self.recipe.size, self.device)
        checkpoint.check_made_of(folder, {"frozen": model.frozen_fingerprints()})
        checkpoint.load_weights(folder, model)
        self.model = model.to(self.device, self.dtype).eval()
        self.words = build_words(config)
        self._null_logp: dict[str, Tensor] = {}

    def volume(self, prepared: Prepared) -> Tensor:
        """A prepared scan as the model's input, `1 X Y Z`."""
        placed = Sample("", 0, (0, 0), (0, 0), prepared.volume_XYZ.shape, prepared.pad_before, "", "", None)
        flat = torch.from_numpy(prepared.volume_XYZ).flatten()
        return unpack(flat, [placed], self.recipe.size, self.device, self.dtype)

    def volumes(self, flat: Tensor, samples: list[Sample]) -> Tensor:
        """Packed scans as the model's input, `B X Y Z`."""
        return unpack(flat, samples, self.recipe.size, self.device, self.dtype)

    @torch.no_grad()
    def encode(self, volume_BXYZ: Tensor) -> Tensor:
        """The image's query tokens, `B Q C`."""
        return self.model.qformer(self.model.vision(volume_BXYZ))

    @torch.no_grad()
    def option_logp(
        self, queries_BQC: Tensor, prompts: list[str], options: list[str], use_queries: bool = True
    ) -> Tensor:
        """Log-likelihood of each option as the whole answer, with its end token: `B O`, float32, on the CPU.

        Args:
            queries_BQC: images encoded before.
            prompts: one per image.
            options: the same for all.
            use_queries: False leaves the image's queries out of the prompt.
        """
        num_options = len(options)
        prompt_ids_BT, is_prompt_BT = self.words.prompts([p for p in prompts for _ in options])
        answer_ids_BA, is_answer_BA = self.words.answers(options * len(prompts))
        words = (prompt_ids_BT, is_prompt_BT, answer_ids_BA, is_answer_BA)
        logp_BA = self.model.language(
            queries_BQC.repeat_interleave(num_options, dim=0),
            torch.full((len(prompts) * num_options,), use_queries, device=self.device),
            *(tensor.to(self.device) for tensor in words),
        )
        return logp_BA.sum(1).view(len(prompts), num_options).cpu()

    def null_logp(self, question: str = DIAGNOSIS_QUESTION) -> Tensor:
        """Log-likelihood of each diagnosis for a blank volume and the question alone, `O`: the calibration's null."""
        if question not in self._null_logp:
            blank = Sample("", 0, (0, 0), (0, 0), (0, 0, 0), (0, 0, 0), "", "", None)
            blank_BXYZ = self.volumes(torch.empty(0, dtype=torch.uint8), [blank])
            options = list(DIAGNOSIS_ANSWERS.values())
            logp_BO = self.option_logp(self.encode(blank_BXYZ), [render_prompt("", question)], options)
            self._null_logp[question] = logp_BO[0]
        return self._null_logp[question]

    def diagnose(
        self,
        queries_BQC: Tensor,
        records: list[str],
        classes: tuple[str, ...] = tuple(DIAGNOSIS_ANSWERS),
        use_queries: bool = True,
        question: str = DIAGNOSIS_QUESTION,
    ) -> Tensor:
        """Probabilities of the diagnoses, `B len(classes)`: softmax of log-likelihood minus the null's.

        Source of the calibration: domain-conditional PMI (arXiv 2104.08315).
        """
        options = [DIAGNOSIS_ANSWERS[name] for name in classes]
        prompts = [render_prompt(record, question) for record in records]
        chosen = [list(DIAGNOSIS_ANSWERS).index(name) for name in classes]
        logp_BO = self.option_logp(queries_BQC, prompts, options, use_queries) - self.null_logp(question)[chosen]
        return logp_BO.softmax(-1)

    def answer(self, queries_BQC: Tensor, prompts: list[str], use_queries: bool = True) -> list[str]:
        """Greedy answers in words, one per image."""
        prompt_ids_BT, is_prompt_BT = self.words.prompts(prompts)
        answer_ids_BA, _ = self.model.language.generate(
            queries_BQC,
            torch.full((len(prompts),), use_queries, device=self.device),
            prompt_ids_BT.to(self.device),
            is_prompt_BT.to(self.device),
            self.words.end_id,
            self.words.pad_id,
        )
        return [text.strip() for text in self.words.language.batch_decode(answer_ids_BA, skip_special_tokens=True)]
