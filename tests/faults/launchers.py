"""A tenth of the matrix through the real launchers, deepspeed and torchrun, and their own death."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from faults.cells import AT_STEP, LAYOUT, SLACK_S, TARGETS, Bench, detection, end
from faults.inject import START_UP, Fault
from faults.ranks import HANG_TIMEOUT_S, ROOT, START_S, TIMEOUT_S, Start, command, free_port
from faults.table import Outcome

DEATHS = ("start-up: engine", "waiting for data", "forward", "optimizer", "save: in the data")
OTHERS = (
    ("SIGKILL", "rank 0", "backward"),
    ("SIGKILL", "another", "save: before latest"),
    ("SIGKILL", "all", "forward"),
    ("SIGTERM", "all", "optimizer"),
    ("SIGTERM", "all", "save: in the data"),
    ("SIGSTOP", "another", "forward"),
    ("SIGSTOP", "rank 0", "backward"),
    ("exception", "another", "forward"),
    ("exception", "rank 0", "start-up: model"),
)


@dataclass(frozen=True)
class Launched:
    """A fault in the first start of a run under a launcher."""

    fault: Fault
    ranks: str
    launcher: str

    @property
    def name(self) -> str:
        return f"{self.fault.kind} at '{self.fault.point}', {self.ranks}, under {self.launcher}"


def all_launched(seed: int) -> list[Launched]:
    """The death of each launcher at five points, and nine other faults under the one and the other."""
    draw = random.Random(f"launchers/{seed}")
    cases = [("launcher death", "its launcher", point, name) for point in DEATHS for name in ("deepspeed", "torchrun")]
    cases += [(*case, name) for case, name in zip(OTHERS, itertools.cycle(("deepspeed", "torchrun")), strict=False)]
    launched = []
    for number, (kind, ranks, point, launcher) in enumerate(cases):
        targets = TARGETS.get(ranks, ())
        hitter = 0 if point.startswith("save: ") else targets[-1] if targets else number % LAYOUT.world
        step = draw.choice(AT_STEP.get(point, (0,)))
        launched.append(Launched(Fault(kind, point, step, hitter, targets), ranks, launcher))
    return launched


def play(bench: Bench, case: Launched, number: int) -> Outcome:
    """Starts the run under its launcher with the fault, then again without; checks everything."""
    outcome = Outcome(f"launchers: {case.launcher}", case.name)
    folder = bench.new_folder(f"launched-{number:03d}")
    timeout_s = HANG_TIMEOUT_S if case.fault.kind == "SIGSTOP" else TIMEOUT_S
    arguments = command(bench.shards, folder / "run", LAYOUT, timeout_s=timeout_s)
    disturbed = start(arguments, folder / "start-0", case.launcher, case.fault)
    outcome.detected_s = detection(disturbed, case.fault)
    if disturbed.hit_at is None:
        outcome.wrong.append(f"the fault never happened:\n{disturbed.log[-1000:]}")
    elif outcome.detected_s is not None and outcome.detected_s > 2 * timeout_s + SLACK_S:
        outcome.wrong.append(f"the others took {outcome.detected_s:.0f} s to end")
    if disturbed.stopped:
        outcome.wrong.append(f"ranks {disturbed.stopped} had to be killed")
    allowed = {"launcher death": {85}, "SIGTERM": {85}, "exception": {86}}.get(case.fault.kind)
    if case.fault.point in START_UP and case.launcher == "torchrun":
        allowed = {85, 86}  # the ranks' meeting point dies with torchrun, which holds it: they may notice that first
    if allowed and not set(disturbed.codes) <= allowed:
        outcome.wrong.append(f"the ranks ended with {disturbed.codes} instead of {allowed}:\n{disturbed.log[-1500:]}")
    again = start(arguments, folder / "start-1", case.launcher, None)
    end(bench, outcome, folder, [disturbed, again])
    return outcome


def start(arguments: list[str], folder: Path, launcher: str, fault: Fault | None) -> Start:
    """Starts the ranks through a launcher and waits until it and they have ended.

    A rank's code is what it wrote down itself, -9 if it could not: launchers return codes of their own.
    """
    folder.mkdir(parents=True)
    script = [str(ROOT / "tests/faults/launched.py"), *arguments]
    program = str(Path(sys.executable).with_name(launcher))
    words = {
        "deepspeed": [program, "--num_gpus", str(LAYOUT.world), "--master_port", str(free_port()), *script],
        "torchrun": [program, "--nproc-per-node", str(LAYOUT.world), "--master-port", str(free_port()), "--", *script],
    }[launcher]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "FAULTS_FOLDER": str(folder)}
    environment["FAULTS_FAULT"] = fault.to_json() if fault else ""
    environment.pop("DS_ACCELERATOR", None)  # train.py finds it out
    began_at = time.time()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    ended_at: dict[int, float] = {}
    killed: list[int] = []
    while process.poll() is None or len(ended_at) < LAYOUT.world:
        for rank in range(LAYOUT.world):
            if rank not in ended_at and (folder / f"pid-{rank}").exists() and not _lives(folder / f"pid-{rank}"):
                ended_at[rank] = time.time()
        if time.time() - began_at > START_S:
            killed = [rank for rank in range(LAYOUT.world) if rank not in ended_at]
            os.killpg(process.pid, signal.SIGKILL)
            for rank in killed:
                if (folder / f"pid-{rank}").exists():
                    os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
            break
        time.sleep(0.05)
    process.wait()
    hit = folder / "hit"
    codes = [folder / f"code-{rank}" for rank in range(LAYOUT.world)]
    return Start(
        codes=[int(path.read_text()) if path.exists() else -9 for path in codes],
        logs=[(folder / "log").read_text(errors="replace")],
        began_at=began_at,
        ended_at=[ended_at.get(rank, time.time()) for rank in range(LAYOUT.world)],
        hit_at=json.loads(hit.read_text())["at"] if hit.exists() else None,
        stopped=killed,
    )


def _lives(pid_file: Path) -> bool:
    try:
        fields = Path(f"/proc/{pid_file.read_text()}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return fields[0] != "Z"
