"""A model that is asked: encode a scan once, then score options or write an answer.

B scans, X Y Z voxels, Q queries, C width, O options.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medblip import checkpoint
from medblip.config import EhrTier, ModelConfig
from medblip.data import unpack
from medblip.model import MedBLIP
from medblip.scoring import DEFAULT_RULE, Options, Rule, probabilities
from medblip.shards import Sample
from medblip.text import DIAGNOSIS_ANSWERS, DIAGNOSIS_QUESTION, render_prompt
from medblip.volume import Prepared, Recipe
from medblip.words import Words, build_words

NOT_OF_THE_MODEL = {
    "data", "run", "deepspeed_config", "wandb", "dry_run", "local_rank", "lm", "vision", "qformer", "steps",
    "global_batch", "micro_batch", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "read_threads",
    "step_timeout_s", "max_skipped", "max_nonfinite", "validate_every", "validate_scans",
    "best_metric",
}  # fmt: skip
"""Options of train.py that a report leaves out: paths, and what changes nothing about the model."""


class Asker:
    """A model with its tokenisers, to be asked; the model must be in evaluation mode.

    Args:
        model: where it runs, in its precision.
        words: the tokenisers.
        grid_size: voxels along each edge of a volume.
        device: where the model runs.
    """

    def __init__(self, model: MedBLIP, words: Words, grid_size: int, device: torch.device):
        self.model, self.words, self.grid_size, self.device = model, words, grid_size, device
        self.dtype = next(model.parameters()).dtype
        self.options = functools.cache(self._options)

    def volumes(self, flat: Tensor, samples: list[Sample]) -> Tensor:
        """Packed scans as the model's input, `B X Y Z`."""
        return unpack(flat, samples, self.grid_size, self.device, self.dtype)

    @torch.no_grad()
    def encode(self, volume_BXYZ: Tensor) -> Tensor:
        """The image's query tokens, `B Q C`."""
        return self.model.qformer(self.model.vision(volume_BXYZ))

    @functools.cached_property
    def blank_QC(self) -> Tensor:
        """The query tokens of a volume without a brain."""
        blank = Sample("", 0, (0, 0), (0, 0), (0, 0, 0), (0, 0, 0), "", "", None)
        return self.encode(self.volumes(torch.empty(0, dtype=torch.uint8), [blank]))[0]

    @torch.no_grad()
    def score_options(
        self, queries_BQC: Tensor, prompts: list[str], answers: tuple[str, ...], use_queries: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each option as the whole answer, with its end token, and whether the model would write it.

        Returns:
            `B O` in float32 and `B O`, both on the CPU.

        Args:
            queries_BQC: images encoded before.
            prompts: one per image.
            answers: the options, the same for all.
            use_queries: False leaves the image's queries out of the prompt.
        """
        prompt_ids_BT, is_prompt_BT = self.words.prompts(prompts)
        queries_BQC = queries_BQC.to(self.device)
        logp_BO, is_written_BO = self.model.language.score_options(
            queries_BQC if use_queries else queries_BQC[:, :0],
            torch.full((len(prompts),), use_queries, device=self.device),
            prompt_ids_BT.to(self.device),
            is_prompt_BT.to(self.device),
            [self._answer_ids(answer).to(self.device) for answer in answers],
        )
        return logp_BO.cpu(), is_written_BO.cpu()

    def _answer_ids(self, answer: str) -> Tensor:
        return self.words.answers([answer])[0][0]

    def _options(self, answers: tuple[str, ...], question: str = DIAGNOSIS_QUESTION) -> Options:
        """What a rule needs to know of the options of a question, with the null: a blank volume, the question alone."""
        logp_BO, _ = self.score_options(self.blank_QC[None], [render_prompt("", question)], answers)
        num_tokens = tuple(len(self._answer_ids(answer)) for answer in answers)
        return Options(answers, num_tokens, tuple(logp_BO[0].tolist()))

    def diagnose(
        self,
        queries_BQC: Tensor,
        records: list[str],
        classes: tuple[str, ...] = tuple(DIAGNOSIS_ANSWERS),
        use_queries: bool = True,
        question: str = DIAGNOSIS_QUESTION,
        rule: Rule = DEFAULT_RULE,
    ) -> Tensor:
        """Probabilities of the diagnoses, `B len(classes)` in float64."""
        answers = tuple(DIAGNOSIS_ANSWERS[name] for name in classes)
        prompts = [render_prompt(record, question) for record in records]
        logp_BO, _ = self.score_options(queries_BQC, prompts, answers, use_queries)
        return torch.from_numpy(probabilities(logp_BO.numpy(), self.options(answers, question), rule))

    @torch.no_grad()
    def answer(self, queries_BQC: Tensor, prompts: list[str], use_queries: bool = True) -> list[str]:
        """Greedy answers in words, one per image."""
        prompt_ids_BT, is_prompt_BT = self.words.prompts(prompts)
        answer_ids_BA, _ = self.model.language.generate(
            queries_BQC.to(self.device),
            torch.full((len(prompts),), use_queries, device=self.device),
            prompt_ids_BT.to(self.device),
            is_prompt_BT.to(self.device),
            self.words.end_id,
            self.words.pad_id,
        )
        return [text.strip() for text in self.words.language.batch_decode(answer_ids_BA, skip_special_tokens=True)]


class Assistant(Asker):
    """A trained model from its run folder, with the recipe its volumes must follow and what it was trained on.

    Args:
        path: a run folder (its latest checkpoint is taken) or one of its checkpoints.
        device: where to run; a GPU where there is one by default.
        which: of a run folder, the latest checkpoint or the one that validation found best.

    Raises:
        ValueError: if there is no such whole checkpoint, or the frozen towers are not those of the training.
    """

    def __init__(
        self, path: str | Path, device: torch.device | None = None, which: Literal["latest", "best"] = "latest"
    ):
        path = Path(path)
        if (path / "state.json").is_file():
            folder, run = path, path.parent.parent
            checkpoint.verify(folder)
        else:
            folder, run = (checkpoint.best if which == "best" else checkpoint.newest_whole)(path), path
        if folder is None:
            raise ValueError(f"--model {path}: neither a run folder with a checkpoint nor a checkpoint")
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state = checkpoint.read_state(folder)
        config = ModelConfig(**state["model"])
        self.name = f"{run.name}/{folder.name}"
        self.recipe = Recipe.from_dict(state["recipe"])
        settings = json.loads((run / "config.json").read_text())
        self.ehr: EhrTier = settings["train"]["ehr"]
        self.train_subjects = frozenset((run / "train_subjects.txt").read_text().split())
        self.trained_on = _trained_on(settings, state, len(self.train_subjects))
        model = MedBLIP(config, self.recipe.size, device)
        checkpoint.check_made_of(folder, {"frozen": model.frozen_fingerprints()})
        checkpoint.load_weights(folder, model)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        super().__init__(model.to(device, dtype).eval(), build_words(config), self.recipe.size, device)

    def volume(self, prepared: Prepared) -> Tensor:
        """A prepared scan as the model's input, `1 X Y Z`."""
        placed = Sample("", 0, (0, 0), (0, 0), prepared.volume_XYZ.shape, prepared.pad_before, "", "", None)
        flat = torch.from_numpy(prepared.volume_XYZ).flatten()
        return unpack(flat, [placed], self.recipe.size, self.device, self.dtype)


def _trained_on(settings: dict[str, Any], state: dict[str, Any], num_subjects: int) -> dict[str, Any]:
    """What a report says of the training: numbers and options that matter, and no path."""
    train = {name: value for name, value in settings["train"].items() if name not in NOT_OF_THE_MODEL}
    return {
        "subjects": num_subjects,
        "scans": settings.get("scans"),
        "steps": state["step"],
        "global_batch": state["global_batch"],
        "train_keys_sha256": state["train_keys"],
        **train,
        "towers": {name: Path(state["model"][name]).name for name in ("vision", "qformer", "language")},
    }
