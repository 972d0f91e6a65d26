"""Bad inputs: each is refused by name, or the last good one is used and said; none is silent and none hangs."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.cells import LAYOUT, Bench, end
from faults.inject import Fault, before
from faults.ranks import TIMEOUT_S, command, start
from faults.table import Outcome

SAVED, BEFORE_IT = "step-7", "step-6"
"""The two checkpoints of the run that most cases go on with."""
FILES = ("weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "state.json", "manifest.json")


def nothing(*_) -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Case:
    """One bad input to one start of a run."""

    row: str
    name: str
    says: tuple[str, ...]
    """What the log must say."""
    damage: Callable[[Path, Path], None] = nothing
    """Of (run folder, folder of shards), each a copy of its own."""
    code: int = 0
    """That all ranks must end with: 0 means that the run then ends like an undisturbed one."""
    is_fresh: bool = False
    """The run begins anew, instead of going on from SAVED."""
    options: tuple[object, ...] = ()
    prepare: Callable[[int], None] = nothing
    """In each rank's process, before it trains."""
    is_again: bool = False
    """Started once more, without the fault; must then end like an undisturbed one."""
    timeout_s: float = TIMEOUT_S
    then: Callable[[Path], list[str]] | None = None
    """What is wrong with the run in the end, where it cannot be the undisturbed one's."""
    mount: str = ""
    """Options of a file system of its own for the run folder; the case is left out where mounting is not allowed."""


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, at: int | None = None) -> None:
    """Flips one bit, in the middle unless told where."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def skipped_one(run: Path) -> list[str]:
    """What is wrong with a run that skipped a sample: the ledger must list it, and have everything else as planned."""
    from medblip import ledger

    proof = ledger.compare(run)
    keys = {key for event in proof["skipped"] for key in event["keys"]}
    wrong = [f"ledger: {fault}" for fault in proof["faults"]]
    if len(keys) != 1 or {event["what"] for event in proof["skipped"]} != {"sample skipped"}:
        wrong.append(f"the ledger lists {proof['skipped']}")
    return wrong


def all_cases() -> list[Case]:
    """Every bad input."""
    return [*checkpoint_cases(), *run_folder_cases(), *other_cases(), *shard_cases(), *storage_cases()]


def checkpoint_cases() -> list[Case]:
    cases = []
    for name in FILES:
        for what, damage in (("truncated", truncate), ("one bit flipped", flip), ("missing", Path.unlink)):
            said = f"{SAVED}/{name}" if (name, what) != ("manifest.json", "missing") else "manifest.json is missing"
            cases.append(
                Case(
                    "bad checkpoint",
                    f"{name} of the newest checkpoint {what}",
                    (
                        "not used: ",
                        said,
                        f"going on from {BEFORE_IT}",
                    ),
                    functools.partial(
                        lambda run, _, name, damage: damage(run / "checkpoints" / SAVED / name),
                        name=name,
                        damage=damage,
                    ),
                )
            )
    for what, content in (("missing", None), ("empty", ""), ("stale", BEFORE_IT + "\n"), ("nonsense", "\0\xff")):
        said = "latest is missing" if content is None else f"latest says '{content.strip()}'"

        def damage(run, _, content=content):
            (run / "latest").unlink()
            if content is not None:
                (run / "latest").write_text(content)

        cases.append(Case("bad checkpoint", f"latest {what}", (said, SAVED), damage))

    def all_bad(run, _):
        for name in (SAVED, BEFORE_IT):
            flip(run / "checkpoints" / name / "weights.safetensors")

    def none_left(run, _):
        shutil.rmtree(run / "checkpoints")

    cases.append(Case("bad checkpoint", "all damaged", (SAVED, BEFORE_IT, "no checkpoint can be used"), all_bad, 1))
    cases.append(Case("bad checkpoint", "all gone", ("once saved a checkpoint",), none_left, 1))
    return cases


def run_folder_cases() -> list[Case]:
    def tear(run, _):
        """As a kill does that comes in the midst of writing step 8."""
        for name, half in (("metrics.jsonl", b'{"step": 8, "los'), ("ledger/events.jsonl", b'{"step": 8')):
            with open(run / name, "ab") as file:
                file.write(half)
        for path in (run / "ledger").glob("*.bin"):
            path.write_bytes(path.read_bytes() + b"step\x08\0")

    def lose(run, _):
        path = sorted((run / "ledger").glob("*.bin"))[1]
        os.truncate(path, path.stat().st_size - 3)

    def found_by_the_ledger(run):
        from medblip import ledger

        try:
            return [] if ledger.compare(run)["faults"] else ["the ledger proves what it cannot know"]
        except ValueError as error:
            return [] if "step 7" in str(error) else [str(error)]

    row = "bad run folder"
    return [
        Case(row, "metrics and ledger torn in a step that no checkpoint has", ("going on from",), tear),
        Case(row, "the ledger lost the checkpoint's step", ("step 7 is not whole",), lose, then=found_by_the_ledger),
        Case(
            row,
            "status.json truncated",
            ("status.json is damaged", "going on from"),
            lambda run, _: truncate(run / "status.json"),
        ),
        Case(row, "config.json truncated", ("config.json",), lambda run, _: truncate(run / "config.json"), 1),
        Case(row, "config.json missing", ("config.json",), lambda run, _: (run / "config.json").unlink(), 1),
    ]


def other_cases() -> list[Case]:
    def other_recipe(_, shards):
        def change(index):
            index["recipe"]["spacing_mm"] = 6.5

        change_json(shards / "index.json", change)

    def other_samples(_, shards):
        change_json(shards / "index.json", lambda index: index["shards"][0]["samples"].pop())

    row = "other config, data or towers"
    return [
        Case(row, "another seed", ("--seed was 0, now 5",), code=1, options=("--seed", 5)),
        Case(row, "another tier", ("--ehr was demographics, now none",), code=1, options=("--ehr", "none")),
        Case(row, "more steps", ("steps was 10, now 20",), code=1, options=("--steps", 20)),
        Case(row, "another global batch", ("global_batch was 4, now 8",), code=1, options=("--global-batch", 8)),
        Case(
            row,
            "another recipe",
            ("spacing_mm is 6.5 in the shards and 7.0 in the model", "give the shards that the run was trained on"),
            other_recipe,
            1,
        ),
        Case(row, "a training sample less", ("train_keys was",), other_samples, 1),
        Case(row, "another frozen tower", ("frozen was {'vision'",), code=1, prepare=_spoil_tower),
    ]


def _spoil_tower(rank: int) -> None:
    """The vision tower on this node is another than the run's: one weight of it differs."""
    import torch

    from medblip.model import MedBLIP

    real = MedBLIP.frozen_fingerprints

    def changed(model):
        name, weight = next((n, p) for n, p in model.named_parameters() if not p.requires_grad and "vision" in n)
        with torch.no_grad():
            weight.view(-1)[0] += 1
        return real(model)

    MedBLIP.frozen_fingerprints = changed


def sample_of(shards: Path, number: int = 0) -> tuple[Path, dict]:
    """Path of the first shard and the index's entry of one of its samples."""
    shard = json.loads((shards / "index.json").read_text())["shards"][0]
    return shards / shard["name"], shard["samples"][number]


def put(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def shard_cases() -> list[Case]:
    row = "bad shards"

    def first(shards):
        return sample_of(shards)[0]

    def twice(_, shards):
        change_json(
            shards / "index.json",
            lambda index: index["shards"][1]["samples"][0].update(key=index["shards"][0]["samples"][0]["key"]),
        )

    def in_volume(_, shards, number=0):
        tar, entry = sample_of(shards, number)
        flip(tar, entry["volume"][0] + entry["volume"][1] // 2)

    def undecodable(_, shards):
        tar, entry = sample_of(shards)
        put(tar, entry["volume"][0], bytes(64))

    def in_record(_, shards, words=b"{{{{", number=0):
        tar, entry = sample_of(shards, number)
        put(tar, entry["record"][0], words)

    def number_in_record(_, shards, to=None):
        """The subject's age, in the record of the first sample, becomes NaN, or differs by a bit."""
        tar, entry = sample_of(shards)
        begin, size = entry["record"]
        with open(tar, "rb") as file:
            file.seek(begin)
            record = file.read(size)
        at = record.index(b'"age_years":') + len(b'"age_years":')
        while not record[at : at + 1].isdigit():
            at += 1
        stop = at
        while record[stop : stop + 1] in b"0123456789.":
            stop += 1
        old = record[at:stop]
        put(tar, begin + at, b"NaN".ljust(len(old)) if to is None else bytes([old[0] ^ 1]) + old[1:])

    def two(_, shards):
        in_volume(_, shards, 0)
        in_volume(_, shards, 1)

    named = ("sample ", "is skipped: ")
    return [
        Case(
            row, "a shard truncated", ("train-00000.tar", "sharding.verify"), lambda _, s: truncate(first(s)), 1, True
        ),
        Case(row, "a shard absent", ("train-00000.tar", "missing"), lambda _, s: first(s).unlink(), 1, True),
        Case(row, "index.json absent", ("index.json", "missing"), lambda _, s: (s / "index.json").unlink(), 1, True),
        Case(row, "index.json truncated", ("index.json",), lambda _, s: truncate(s / "index.json"), 1, True),
        Case(row, "one KEY twice", ("same KEY stands twice",), twice, 1, True),
        Case(row, "one bit of a volume flipped", (*named, "damaged"), in_volume, is_fresh=True, then=skipped_one),
        Case(row, "a volume that does not decode", named, undecodable, is_fresh=True, then=skipped_one),
        Case(row, "a record that is no JSON", named, in_record, is_fresh=True, then=skipped_one),
        Case(row, "a record with NaN", named, number_in_record, is_fresh=True, then=skipped_one),
        Case(
            row,
            "one bit of a record flipped, still JSON",
            named,
            functools.partial(number_in_record, to=1),
            is_fresh=True,
            then=skipped_one,
        ),
        Case(row, "more bad samples than allowed", ("--max-skipped", "could not be read"), two, 1, True),
    ]


def storage_cases() -> list[Case]:
    row = "bad storage"
    goes_on = ("training goes on",)
    return [
        Case(
            row,
            "fsync fails in one save (EIO)",
            ("step 3 could not be written", *goes_on),
            is_fresh=True,
            prepare=_failing_fsync,
        ),
        Case(
            row,
            "no space in one save (ENOSPC)",
            ("step 3 could not be written", "No space left", *goes_on),
            is_fresh=True,
            prepare=_no_space_once,
        ),
        Case(
            row,
            "no space from the first save on, then room",
            ("last checkpoint", "No space left"),
            code=86,
            is_fresh=True,
            prepare=_no_space,
            is_again=True,
        ),
        Case(
            row,
            "a line of metrics and ledger cannot be written",
            ("cannot be written", *goes_on),
            is_fresh=True,
            prepare=_failing_lines,
        ),
        Case(row, "slow: every fsync takes 0.3 s", (), is_fresh=True, prepare=_slow_fsync),
        Case(row, "slow: every read of a shard takes 0.2 s", (), is_fresh=True, prepare=_slow_reads),
        Case(
            row,
            "a read of a shard hangs",
            ("waiting for data",),
            code=86,
            is_fresh=True,
            prepare=_hanging_read,
            is_again=True,
            timeout_s=5,
        ),
        Case(
            row,
            "a read of a shard fails (EIO)",
            ("is skipped: ", "Input/output error"),
            is_fresh=True,
            prepare=_failing_read,
            then=skipped_one,
        ),
        Case(
            row,
            "a full file system of 12 MB",
            ("0.0 GB free, checkpoints of", "free some, or a lower --keep-checkpoints"),
            code=1,
            is_fresh=True,
            mount="size=12m",
            is_again=True,
        ),
        Case(
            row,
            "a file system that fills up after the first save",
            ("step 6 could not be written", "No space left", "last checkpoint"),
            code=86,
            is_fresh=True,
            mount="size=300m",
            prepare=_fill_up,
            is_again=True,
        ),
        Case(
            row,
            "checkpoints on a file system that turns read-only",
            ("could not be written", "Read-only file system", *goes_on),
            code=86,
            is_fresh=True,
            mount="size=200m",
            prepare=_turn_read_only,
            is_again=True,
        ),
    ]


def _failing_fsync(rank: int) -> None:
    from medblip import checkpoint

    def fail(path):
        if "step-3" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before(checkpoint, "_fsync", fail)


def _no_space_once(rank: int) -> None:
    _no_space(rank, only="step-3")


def _no_space(rank: int, only: str = "") -> None:
    from medblip import checkpoint

    def fail(tensors, path):
        if only in str(path) and path.name == "exp_avg.safetensors":
            path.write_bytes(bytes(1000))  # the part that fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    before(checkpoint, "_save_tensors", fail)


def _failing_lines(rank: int) -> None:
    """Five writes of lines fail, one of them after half of the line."""
    from medblip.lines import Appender

    calls = []

    class Failing:
        def __init__(self, file):
            self._file = file

        def write(self, content):
            calls.append(1)
            if 8 < len(calls) <= 13:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content[: max(1, len(content) // 2)])  # a write may be short

        def __getattr__(self, name):
            return getattr(self._file, name)

    real = Appender.__init__

    def made(appender, path):
        real(appender, path)
        appender._file = Failing(appender._file)

    Appender.__init__ = made


def _slow_fsync(rank: int) -> None:
    before(os, "fsync", lambda *_: time.sleep(0.3))


def _slow_reads(rank: int) -> None:
    before(os, "pread", lambda *_: time.sleep(0.2))


def _hanging_read(rank: int) -> None:
    if rank == 1:
        reads = []
        before(os, "pread", lambda *_: (reads.append(1), time.sleep(3600 if len(reads) > 12 else 0)))


def _failing_read(rank: int) -> None:
    from medblip.shards import Reader

    def fail(reader, file, sample, into):
        if sample.key == reader.index.samples("train")[0].key:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before(Reader, "_fill", fail)


def _fill_up(rank: int) -> None:
    """Somebody else's file takes all the space that is left."""
    from medblip import checkpoint

    def fill(run, tensors, state):
        if state["step"] == 6:
            with open(run.parent / "somebody-elses", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(run).free)

    if rank == 0:
        before(checkpoint, "write_folder", fill)


def _turn_read_only(rank: int) -> None:
    from medblip import checkpoint

    def turn(run, tensors, state):
        if state["step"] == 6:
            folder = str(run / "checkpoints")
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    if rank == 0:
        before(checkpoint, "write_folder", turn)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system: root outside of a container may."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def begun_run(bench: Bench) -> tuple[Path, Path]:
    """A run that was stopped after step 7, with the checkpoints of steps 6 and 7; and its notes."""
    folder = bench.new_folder("begun")
    fault = Fault("SIGTERM", "forward", 8, 0, (0,))
    begun = start(command(bench.shards, folder / "run", LAYOUT), LAYOUT, folder / "start-0", fault)
    assert begun.codes == [85, 85], begun.log
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == [BEFORE_IT, SAVED]
    return folder / "run", folder / "start-0"


def play(bench: Bench, begun: tuple[Path, Path], case: Case, number: int) -> Outcome:
    """Starts a run with the bad input; checks codes, what was said, and the end."""
    outcome = Outcome(case.row, case.name)
    folder = bench.new_folder(f"input-{number:03d}")
    run, shards = folder / "run", folder / "shards"
    if case.mount:
        subprocess.run(["mount", "-t", "tmpfs", "-o", case.mount, "tmpfs", str(run.parent)], check=True)
    try:
        shutil.copytree(bench.shards, shards)
        if not case.is_fresh:
            shutil.copytree(begun[0], run)
        shutil.copytree(begun[1], folder / "start-0") if not case.is_fresh else (folder / "start-0").mkdir()
        case.damage(run, shards)
        arguments = command(shards, run, LAYOUT, *case.options, timeout_s=case.timeout_s)
        before_it = _checkpoints(run)
        first = start(arguments, LAYOUT, folder / "start-1", None, case.prepare)
        if first.codes != [case.code] * LAYOUT.world:
            outcome.wrong.append(f"the ranks ended with {first.codes} instead of {case.code}:\n{first.log[-2500:]}")
        outcome.wrong += [
            f"it did not say '{words}':\n{first.log[-2500:]}" for words in case.says if words not in first.log
        ]
        if first.stopped:
            outcome.wrong.append("it hung")
        if case.code == 1 and _checkpoints(run) != before_it:
            outcome.wrong.append("a run that was refused changed its checkpoints")
        starts = [first, first]
        if case.is_again:
            if case.mount:  # the disk is mended
                subprocess.run(["umount", str(run / "checkpoints")], capture_output=True)
                subprocess.run(["mount", "-o", "remount,size=700m", str(run.parent)], check=True)
            starts.append(start(arguments, LAYOUT, folder / "start-2"))
        if case.then:
            outcome.wrong += case.then(run)
        elif (case.code == 0 or case.is_again) and not outcome.wrong:
            end(bench, outcome, folder, starts)
    finally:
        if case.mount:
            subprocess.run(["umount", "-l", str(run / "checkpoints")], capture_output=True)
            subprocess.run(["umount", "-l", str(run.parent)], check=True)
    if not outcome.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _checkpoints(run: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted((run / "checkpoints").rglob("*")) if p.is_file()}
