"""What came of a step, what was skipped so far, and when it is too much."""

from __future__ import annotations

from dataclasses import dataclass, field

from medblip.distributed import log


@dataclass(frozen=True)
class StepResult:
    """What came of one optimizer step on this rank; losses are means over the global batch."""

    losses: dict[str, float]
    keys: list[str]
    waited_s: float
    unreadable: dict[str, str]
    is_unreadable_anywhere: bool
    is_skipped: bool


@dataclass
class Tally:
    """What was skipped so far in this start of the run, alike on all ranks, and when it is too much."""

    max_samples: int
    max_steps_in_a_row: int
    unreadable: set[str] = field(default_factory=set)
    steps: int = 0
    in_a_row: int = 0

    def add(self, step: int, result: StepResult, control, account) -> None:
        """Counts what a step skipped; a collective where it skipped anything.

        Raises:
            ValueError: naming the samples, when there are too many.
        """
        if result.is_unreadable_anywhere:
            for key, why in {k: w for some in control.gather(result.unreadable) for k, w in some.items()}.items():
                account.event(step, "sample skipped", why, [key])
                if key not in self.unreadable:
                    log.warning("step %d: sample %s is skipped: %s", step, key, why)
                self.unreadable.add(key)
            if len(self.unreadable) > self.max_samples:
                raise ValueError(
                    f"{len(self.unreadable)} samples could not be read, {self.max_samples} may be skipped "
                    f"(--max-skipped): {' '.join(sorted(self.unreadable)[:8])}; run python -m sharding.verify"
                )
        self.in_a_row = self.in_a_row + 1 if result.is_skipped else 0
        if result.is_skipped:
            self.steps += 1
            keys = [key for some in control.gather(result.keys) for key in some]
            account.event(step, "step skipped", "a loss or a gradient is not finite", keys)
            log.warning("step %d is skipped: a loss or a gradient is not finite; samples %s", step, " ".join(keys))
            if self.in_a_row > self.max_steps_in_a_row:
                raise ValueError(
                    f"{self.in_a_row} steps in a row had a loss or a gradient that is not finite (--max-nonfinite); "
                    f"the last one, {step}, had the samples {' '.join(keys)}"
                )

    def counts(self) -> dict[str, int]:
        """For the metrics: nothing, as long as nothing was skipped."""
        return {n: c for n, c in (("samples_skipped", len(self.unreadable)), ("steps_skipped", self.steps)) if c}
