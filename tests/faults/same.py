"""The one check: is a run that was disturbed, in the end, bit for bit the undisturbed run of the same layout?"""

from __future__ import annotations

import json
from pathlib import Path

from medblip import checkpoint, ledger
from medblip.lines import read_records

CHANGES_WITH_TIME = {"samples_per_s", "data_wait_fraction", "save_stall_s"}


def differences(run: Path, notes: list[Path], undisturbed: Path, notes_undisturbed: list[Path]) -> list[str]:
    """What differs in the end, in words; empty if nothing does.

    Compared are the bytes of weights and both moments, state.json (step, position in the data, what the run was made
    of), each step's losses and learning rate, each rank's random state and group learning rates after each step, the
    samples that each step used; and the ledger must prove that each sample was used once per epoch as planned.

    Args:
        run: folder of the disturbed run.
        notes: folders of its starts, in their order, see inject.observe.
        undisturbed: folder of the run that nothing happened to.
        notes_undisturbed: of its one start.
    """
    found = []
    status = json.loads((run / "status.json").read_text())
    last = (undisturbed / "latest").read_text().strip()
    if status["state"] != "done" or (run / "latest").read_text().strip() != last:
        found.append(f"status.json says {status['state']}, latest says {(run / 'latest').read_text().strip()}")
    if leftovers := [str(path.relative_to(run)) for path in run.rglob("*.unfinished")]:
        found.append(f"left behind: {', '.join(leftovers)}")
    found += [path.read_text() for folder in notes for path in sorted(folder.glob("unsynced-*"))]
    one, other = (folder / "checkpoints" / last for folder in (run, undisturbed))
    if not one.is_dir():
        return [*found, f"no checkpoint {last}"]
    checkpoint.verify(one)
    for name in sorted({path.name for path in one.iterdir()} | {path.name for path in other.iterdir()}):
        if not all((folder / name).exists() for folder in (one, other)):
            found.append(f"{name} is there in only one of both")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{last}/{name} differs")
    best = [
        (folder / "best.json").read_text() if (folder / "best.json").exists() else "" for folder in (run, undisturbed)
    ]
    if best[0] != best[1]:
        found.append(f"best.json differs: {best}")
    if _metrics(run) != _metrics(undisturbed):
        found.append("metrics.jsonl differs")
    if _steps(notes) != _steps(notes_undisturbed):
        found.append("random state or learning rates differ")
    try:
        proof = ledger.compare(run)
        found += [f"ledger: {fault}" for fault in proof["faults"]]
        found += [f"ledger: {event}" for event in proof["skipped"]]
        if ledger.read(run) != ledger.read(undisturbed):
            found.append("the ledger differs")
    except ValueError as error:
        found.append(f"ledger: {error}")
    return found


def redone(run: Path) -> int:
    """Steps that were done again, by the ledger."""
    return ledger.compare(run)["steps_done_again"]


def _best(run: Path) -> str:
    return (run / "best.json").read_text() if (run / "best.json").exists() else "none"


def _metrics(run: Path) -> list[dict]:
    records = read_records(run / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in CHANGES_WITH_TIME} for record in records]


def _steps(notes: list[Path]) -> dict[tuple[str, int], tuple]:
    """(rank's file, step) -> random state and learning rates; of a step that was done again, the last time."""
    return {
        (path.name, line["step"]): (line["random"], line["lr"])
        for folder in notes
        for path in sorted(folder.glob("steps-*.jsonl"))
        for line in read_records(path)
    }
