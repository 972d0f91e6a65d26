"""Scores the model on a fixed part of the split val while it trains, and knows which checkpoint was best so far.

The same asking and scoring as `medblip evaluate`, shared among the ranks. Nothing random is drawn and nothing is
changed, so that a run learns the same with and without it. What is best travels in the checkpoint's state: a run that
goes on from step N knows what it knew at step N.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medblip import checkpoint
from medblip.arms import classes_of
from medblip.asking import Interview, encode
from medblip.config import TrainConfig
from medblip.distributed import log
from medblip.inference import Asker
from medblip.metrics import rows_sum_to_1, score_once
from medblip.scoring import DEFAULT_RULE, probabilities
from medblip.shards import Reader, ShardIndex
from medblip.share import Crew
from medblip.words import Words


class _Stopped(Exception):
    pass


class Validation:
    """The validation of one run.

    Args:
        config: `validate_every`, `validate_scans`, `best_metric`, the tier and the run folder.
        index: of the shards.
        words: the tokenisers.
        parts: what a training step works with (train.py).
        batch: scans at a time on each rank.
        state: the state of the checkpoint that the run goes on from; empty at the start.

    Raises:
        ValueError: if the split val is missing or has no two diagnoses.
    """

    def __init__(self, config: TrainConfig, index: ShardIndex, words: Words, parts, batch: int, state: dict[str, Any]):
        self.config, self.index, self.words, self.parts, self.batch = config, index, words, parts, batch
        self.best, self.validated = state.get("best"), state.get("validated", 0)
        if self.best is not None and self.best["metric"] != config.best_metric:
            log.warning("the best checkpoint was that of %s, and is sought anew by %s", self.best, config.best_metric)
            self.best = None
        self.samples = []
        if config.validate_every:
            found = sorted((sample for sample in index.samples("val") if sample.diagnosis), key=lambda s: s.key)
            self.samples = found[: config.validate_scans]  # KEYs are hashes
            if len(classes_of(sample.diagnosis for sample in self.samples)) < 2:
                raise ValueError(
                    f"--validate-every: the first {len(self.samples)} scans of the split val have no two diagnoses; "
                    "raise --validate-scans, or give more subjects the split val in the manifest"
                )
        if parts.rank.is_main:
            checkpoint.point_best(Path(config.run), self.best)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": self.best, "validated": self.validated} if self.config.validate_every else {}

    def is_best(self, step: int) -> bool:
        """Whether the weights of this step are the best so far, and must be saved."""
        return self.best is not None and self.best["step"] == step

    def catch_up(self, step: int) -> dict[str, float | None]:
        """`after` for the step that a run goes on from, whose checkpoint is there; a stop may have come between."""
        numbers = self.after(step)
        if self.is_best(step) and self.parts.rank.is_main:
            checkpoint.point_best(Path(self.config.run), self.best)
        return numbers

    def after(self, step: int) -> dict[str, float | None]:
        """The `val_` numbers of a step for metrics.jsonl; none where it is not due or a rank was asked to stop.

        A collective. Done once for a step: a run that was stopped in the middle does it when it goes on.
        """
        every = self.config.validate_every
        if not every or not step or step % every or self.validated == step:
            return {}
        try:
            numbers = self._measure(step)
        except _Stopped:
            return {}
        self.validated = step
        value = numbers[f"val_{self.config.best_metric}"]
        sign = -1 if self.config.best_metric.startswith("loss") else 1
        if value is not None and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"step": step, "metric": self.config.best_metric, "value": value}
        return numbers

    def _measure(self, step: int) -> dict[str, float | None]:
        parts = self.parts

        def before_batch() -> None:
            parts.watch.doing("validating", step)
            if parts.control.any(parts.stopping.wanted)[0]:
                raise _Stopped

        model = parts.engine.module
        modes = [(module, module.training) for module in model.modules()]
        reader = Reader(self.index, self.config.read_threads)
        try:
            model.eval()
            asker = Asker(model, self.words, self.index.grid_size, parts.rank.device)
            crew = Crew(parts.rank, parts.control, before_batch)
            return measure(encode(asker, reader, self.samples, self.config.ehr, self.batch, crew))
        finally:
            reader.close()
            for module, is_training in modes:  # towers are not all in the mode of the whole
                module.training = is_training


def measure(interview: Interview) -> dict[str, float | None]:
    """Balanced accuracy and macro AUC with the record (`val_...`) and without (`val_image_...`), and `val_loss_lm`.

    By the default rule. The loss is that of the right answer to the question for the diagnosis: mean over its tokens,
    then over the scans. None where a likelihood is not finite.
    """
    rows, truth = list(range(len(interview.scans))), [scan.sample.diagnosis for scan in interview.scans]
    numbers: dict[str, float | None] = {}
    for arm, name in (("both", "val"), ("image", "val_image")):
        told = interview.diagnose(rows, (arm,), seed=0)
        found = dict.fromkeys(("balanced_accuracy", "macro_auc"))
        if np.isfinite(told.logp_NO).all():
            columns = [told.offered.index(name) for name in told.classes]
            p_NK = probabilities(told.logp_NO, told.options, DEFAULT_RULE)[:, columns]
            found = score_once(truth, rows_sum_to_1(p_NK), told.classes)
        numbers |= {f"{name}_{metric}": found[metric] for metric in ("balanced_accuracy", "macro_auc")}
        if arm == "both":
            right_N = np.array([told.offered.index(diagnosis) for diagnosis in truth])
            loss = -(told.logp_NO / np.array(told.options.num_tokens))[rows, right_N].mean()
            numbers["val_loss_lm"] = float(loss) if np.isfinite(loss) else None
    return numbers
