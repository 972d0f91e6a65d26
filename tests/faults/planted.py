"""The suite can fail: a fault is planted in the product in turn, and the one check must find it.

The product with the planted fault runs undisturbed and disturbed, like any other; a plant that no difference gives away
has not been caught.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.cells import LAYOUT, Bench
from faults.inject import Fault
from faults.ranks import command, start
from faults.same import differences
from faults.table import Outcome

STOPPED = Fault("SIGTERM", "forward", 5, 0, (0,))
KILLED = Fault("SIGKILL", "save: in the data", 6, 0, (0, 1))
KILLED_BETWEEN = Fault("SIGKILL", "forward", 6, 0, (0, 1))


def no_random_state() -> None:
    import train

    train.seed_dropout = lambda *_: None


def no_weights() -> None:
    """Neither those of the model nor the master weights."""
    from medblip import checkpoint

    checkpoint.load_weights = lambda *_: None
    real = checkpoint._put
    checkpoint._put = lambda parameter, value, key: real(parameter, value, key) if key else None


def no_moments() -> None:
    from medblip import checkpoint

    real = checkpoint._put
    checkpoint._put = lambda parameter, value, key: None if key else real(parameter, value, key)


def no_adam_step() -> None:
    from medblip import checkpoint

    real = checkpoint.read_state
    checkpoint.read_state = lambda folder: real(folder) | {"adam_step": 0}


def no_schedule() -> None:
    """Warm-up begins anew in each start."""
    from medblip import optim

    real, first = optim.set_learning_rate, []

    def anew(optimizer, schedule, step):
        first.append(step)
        return real(optimizer, schedule, step - first[0])

    optim.set_learning_rate = anew


def no_data_position() -> None:
    import train

    real = train.positions
    train.positions = lambda first_step, *rest: real(0, *rest)


def no_ledger() -> None:
    from medblip.ledger import Ledger

    Ledger.step = lambda *_: None


def no_cut() -> None:
    """Of the ledger, back to the checkpoint."""
    from medblip import ledger

    ledger.cut_back = lambda *_: 0


def no_rename() -> None:
    """A checkpoint has its name from the first byte on."""
    from medblip import checkpoint

    real = Path.with_name
    Path.with_name = lambda path, name: path if ".step-" in name else real(path, name)
    replace = checkpoint.os.replace
    checkpoint.os.replace = lambda old, new: None if old == new else replace(old, new)
    rmtree = shutil.rmtree
    checkpoint.shutil.rmtree = lambda path, **named: (
        None if (Path(path) / "manifest.json").exists() and Path(path).name == _newest(path) else rmtree(path, **named)
    )


def _newest(path: Path) -> str:
    return max(Path(path).parent.glob("step-*"), key=lambda folder: int(folder.name[5:])).name


def no_fsync() -> None:
    from medblip import checkpoint

    checkpoint._fsync = lambda path: None


@dataclass(frozen=True)
class Plant:
    """A fault of the product, and what disturbs the run in which it must show."""

    name: str
    plant: Callable[[], None]
    disturbed_by: Fault = STOPPED


PLANTS = (
    Plant("random state is not restored", no_random_state),
    Plant("weights are not restored", no_weights),
    Plant("moments are not restored", no_moments),
    Plant("Adam's step is not restored", no_adam_step),
    Plant("the schedule begins anew", no_schedule),
    Plant("the data begin anew", no_data_position),
    Plant("no ledger is written", no_ledger),
    Plant("the ledger is not cut back", no_cut, KILLED_BETWEEN),
    Plant("a checkpoint is written under its own name", no_rename, KILLED),
    Plant("nothing is brought to the disk before it gets its name", no_fsync),
)


def play(bench: Bench, plant: Plant, number: int) -> Outcome:
    """Trains with the plant, undisturbed and disturbed; survived if the suite saw it."""
    outcome = Outcome("planted faults that were caught", plant.name)
    folder = bench.new_folder(f"planted-{number:03d}")

    def prepare(rank: int) -> None:
        plant.plant()

    for name, faults in (("undisturbed", [None]), ("disturbed", [plant.disturbed_by, None])):
        arguments = command(bench.shards, folder / name, LAYOUT)
        starts = [
            start(arguments, LAYOUT, folder / f"{name}-{number}", fault, prepare) for number, fault in enumerate(faults)
        ]
    found = [] if starts[0].hit_at else ["the disturbance never happened"]
    found += [f"the last start ended with {starts[-1].codes}"] if any(starts[-1].codes) else []
    found += ["a checkpoint was damaged"] if "not used: " in starts[-1].log else []
    notes = [folder / "disturbed-0", folder / "disturbed-1"]
    found += differences(folder / "disturbed", notes, folder / "undisturbed", [folder / "undisturbed-0"])
    if starts[0].hit_at is None:
        outcome.wrong.append(f"the run was not disturbed:\n{starts[0].log[-1000:]}")
    if not found:
        outcome.wrong.append("nothing was found")
    outcome.name += f" ({'; '.join(line.splitlines()[0] for line in found[:3])})"
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome
