"""The matrix: each kind of fault at each point once, the rank rotating; SIGKILL at each point in each rank."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults import inject
from faults.inject import Fault
from faults.ranks import GLOBAL_BATCH, HANG_TIMEOUT_S, STEPS, TIMEOUT_S, Layout, Start, command, start
from faults.same import differences, redone
from faults.table import Outcome

LAYOUT = Layout()
VALIDATED = Layout(validate_every=4)
"""The layout of the cells whose fault comes during evaluation."""
TARGETS = {"rank 0": (0,), "another": (1,), "all": (0, 1)}
AT_STEP = {
    **dict.fromkeys(inject.STEP, (4, 5, 7, 8)),
    **dict.fromkeys(inject.SAVE, (3, 6, 9)),
    "epoch edge": (2, 4),  # a batch with samples of two epochs, and the first of an epoch: 6 samples, 4 a step
    "prune": (9,),
    "evaluation": (4, 8),
    "last save": (STEPS,),
}
CAN_BE_DONE = ("last save", "leaving")
SLACK_S = 15.0
"""Beyond twice the time-out, for a machine that is busy with other things."""


@dataclass(frozen=True)
class Cell:
    """One case of the matrix: a fault in the first start of a run, or in its second if the run must have begun."""

    fault: Fault
    ranks: str

    @property
    def name(self) -> str:
        at = f" of step {self.fault.step}" if self.fault.step else ""
        return f"{self.fault.kind} at '{self.fault.point}'{at}, {self.ranks}"


def matrix(seed: int) -> list[Cell]:
    """All cells, in an order that is the seed's."""
    draw = random.Random(seed)
    rotating = itertools.cycle(TARGETS)
    cells = []
    for kind in inject.KINDS[:-1]:
        for point in inject.POINTS:
            if kind == "loader death" and point not in (*inject.STEP, *inject.SAVE, *inject.PRUNE):
                continue  # there is no loader yet, or no more
            names = list(TARGETS) if kind == "SIGKILL" else [next(rotating)]
            for name in names:
                cells.append(_cell(kind, point, name, draw))
    draw.shuffle(cells)
    return cells


def _cell(kind: str, point: str, ranks: str, draw: random.Random) -> Cell:
    targets = TARGETS[ranks]
    if point in inject.ONLY_RANK_0:
        hitter = 0
        if kind not in inject.SIGNALS:
            targets, ranks = (0,), "rank 0"  # it happens in the code that comes there
    else:
        hitter = targets[-1]
        if kind not in inject.SIGNALS and len(targets) > 1:
            targets, ranks = (1,), "another"
    return Cell(Fault(kind, point, draw.choice(AT_STEP.get(point, (0,))), hitter, targets), ranks)


class Bench:
    """Where cases are run: the shards, the undisturbed run of each layout, and a folder for the cases.

    Args:
        folder: for all of it; case folders are removed when the case has survived.
        shards: to train on.
    """

    def __init__(self, folder: Path, shards: Path):
        self.folder, self.shards = folder, shards
        self._undisturbed: dict[Layout, tuple[Path, Path]] = {}

    def undisturbed(self, layout: Layout) -> tuple[Path, Path]:
        """Folder of the run that nothing happened to, and of its notes; trained when first asked for."""
        if layout not in self._undisturbed:
            folder = self.new_folder(f"undisturbed-{layout.engine}-{layout.world}-{layout.validate_every}")
            begun = start(command(self.shards, folder / "run", layout), layout, folder / "start-0")
            assert begun.codes == [0] * layout.world, begun.log
            self._undisturbed[layout] = folder / "run", folder / "start-0"
        return self._undisturbed[layout]

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def compare(self, run: Path, notes: list[Path], layout: Layout) -> list[str]:
        return differences(run, notes, self.undisturbed(layout)[0], [self.undisturbed(layout)[1]])


def layout_of(cell: Cell) -> Layout:
    """The layout of the runs of a cell."""
    return VALIDATED if cell.fault.point in inject.EVALUATION else LAYOUT


def play(bench: Bench, cell: Cell, number: int) -> Outcome:
    """Starts the run with the fault, then the same command again, without it, until it is done; checks everything."""
    outcome = Outcome(f"matrix: {cell.fault.kind}", cell.name)
    folder = bench.new_folder(f"cell-{number:03d}")
    fault = cell.fault
    layout = layout_of(cell)
    timeout_s = HANG_TIMEOUT_S if fault.kind == "SIGSTOP" else TIMEOUT_S
    arguments = command(bench.shards, folder / "run", layout, timeout_s=timeout_s)
    faults = [fault, None]
    if fault.point in inject.LOAD:  # it takes a run that has a checkpoint
        faults = [Fault("SIGTERM", "forward", 5, 0, (0,)), *faults]
    starts: list[Start] = []
    for number, of_start in enumerate(faults):
        starts.append(start(arguments, layout, folder / f"start-{number}", of_start))
        if of_start is fault:
            outcome.wrong += judge(cell, starts[-1], timeout_s)
            outcome.detected_s = detection(starts[-1], fault)
        if starts[-1].codes == [0, 0]:
            break
    # A kill may leave a checkpoint behind that has no name yet, never one that has its name and is not whole.
    outcome.wrong += [
        f"a checkpoint was damaged:\n{again.log[-1000:]}" for again in starts if "not used: " in again.log
    ]
    end(bench, outcome, folder, starts, layout)
    return outcome


def end(bench: Bench, outcome: Outcome, folder: Path, starts: list[Start], layout: Layout = LAYOUT) -> None:
    """The end of every case: the last start ended well, and the run is the undisturbed one; then its folder goes."""
    if any(starts[-1].codes):
        outcome.wrong.append(f"the last start ended with {starts[-1].codes}:\n{starts[-1].log[-2000:]}")
    else:
        notes = [folder / f"start-{number}" for number in range(len(starts))]
        outcome.wrong += bench.compare(folder / "run", notes, layout)
        outcome.steps_redone = redone(folder / "run")
        outcome.restarted_s = first_step(notes[-1], starts[-1])
    if not outcome.wrong:
        shutil.rmtree(folder, ignore_errors=True)  # it may be a file system of its own


def detection(begun: Start, fault: Fault) -> float | None:
    """Seconds from the fault to the end of the last rank that it did not happen to."""
    others = [at for rank, at in enumerate(begun.ended_at) if rank not in fault.targets]
    return max(others) - begun.hit_at if others and begun.hit_at else None


def first_step(notes: Path, begun: Start) -> float | None:
    """Seconds from the start to the end of its first step; None if it made none."""
    path = notes / "steps-0.jsonl"
    if not path.exists():
        return None
    return json.loads(path.read_text().splitlines()[0])["at"] - begun.began_at


def judge(cell: Cell, begun: Start, timeout_s: float) -> list[str]:
    """What was wrong with how the ranks of the disturbed start ended: codes, times, messages."""
    fault = cell.fault
    if begun.hit_at is None:
        return [f"the fault never happened; codes {begun.codes}:\n{begun.log[-1000:]}"]
    wrong = []
    for rank, code in enumerate(begun.codes):
        if code not in (allowed := expected(fault, rank)):
            wrong.append(f"rank {rank} ended with {code} instead of {sorted(allowed)}:\n{begun.logs[rank][-1500:]}")
    others = [rank for rank in range(len(begun.codes)) if rank not in fault.targets]
    if late := [rank for rank in others if rank in begun.stopped]:
        wrong.append(f"ranks {late} did not end by themselves")
    waited_s = detection(begun, fault)
    if fault.kind in ("SIGKILL", "SIGSTOP") and waited_s is not None and waited_s > 2 * timeout_s + SLACK_S:
        wrong.append(f"the others took {waited_s:.0f} s to end")
    if fault.kind in ("SIGKILL", "SIGSTOP") and fault.point != "start-up: meeting":
        # Dead or stopped: one clear message that names the rank, if there is anyone left to say it.
        for rank in others:
            named = [f"rank {target} {what}" for target in fault.targets for what in ("is gone", "does not")]
            if begun.codes[rank] == 86 and not any(words in begun.logs[rank] for words in named):
                wrong.append(f"rank {rank} did not name the culprit:\n{begun.logs[rank][-1500:]}")
    return wrong


def expected(fault: Fault, rank: int) -> set[int]:
    """The exit codes that docs/training.md promises a rank when this fault happens."""
    is_target = rank in fault.targets
    # The last step is trained while the checkpoint before it is written.
    is_at_end = fault.point in CAN_BE_DONE or (fault.point in inject.IN_THE_WRITER and fault.step >= STEPS - 1)
    can_be_done = {0} if is_at_end else set()
    if fault.kind in ("SIGKILL", "SIGSTOP"):
        if is_target:
            return {-9}
        # While the ranks still meet, the launcher ends those that wait: by SIGTERM, which is obeyed at once.
        return {85} if fault.point == "start-up: meeting" else {86} | can_be_done
    if fault.kind == "SIGTERM":
        # Before the ranks can agree on anything, the one that was asked ends at once, and the others miss it.
        return {85} | ({86} if fault.point in inject.START_UP and not is_target else can_be_done)
    if fault.kind == "exception":
        if fault.point == "start-up: meeting":
            return {86} if is_target else {85}
        return {0} if fault.point in inject.IN_THE_WRITER else {86} | can_be_done
    # The loader's thread is dead: who has all batches that are still needed does not miss it.
    return {86} | ({0} if fault.step >= STEPS - 1 else set())


assert GLOBAL_BATCH * 2 % 6, "the epoch must end within a batch"
