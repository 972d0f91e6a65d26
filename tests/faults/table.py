"""Runs cases in lanes, and makes one table of what came of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.ranks import ROOT, middle

HEADING = "## Faults survived"
ABOUT = """Every case ends in one check: weights, both moments, `state.json`,
every step's losses and learning rates, each rank's random state after each step and the ledger are bitwise those of an
undisturbed run of the same layout. For bad inputs also: refused by name, or the last good one used and said. For other
world sizes: same samples and learning rates, losses within 1e-4. Nothing is tried twice. Times are median / p95 / max:
from the fault to the end of the last rank that it did not happen to, and from the next start to the end of its first
step. Ranks are forked with everything imported, but for those under the launchers."""


@dataclass
class Outcome:
    """What came of one case; it survived if `wrong` is empty."""

    row: str
    """Of the table."""
    name: str
    wrong: list[str] = field(default_factory=list)
    detected_s: float | None = None
    """From the fault to the end of the last rank that it did not happen to."""
    restarted_s: float | None = None
    """From the next start to the end of its first step."""
    steps_redone: int | None = None
    elapsed_s: float = 0.0


def in_lanes(part: str, cases: Sequence, play: Callable[[object, int], Outcome], lanes: int, folder: Path) -> None:
    """Plays the cases of a part, some at a time, each lane in a process of its own; says what came of each as it ends.

    `play` is given a case and its number. A case whose play itself fails has not survived. What came of them is left
    in `folder`, and a case that has left something there is not played again, whatever came of it.
    """
    known = [outcome.name for outcome in outcomes(folder, part)]
    left = [n for n, case in enumerate(cases) if not any(name.startswith(case.name) for name in known)]
    pids = []
    for lane in range(lanes):
        pid = os.fork()
        if pid == 0:
            for number in left[lane::lanes]:
                keep(part, lane, _play(play, cases[number], number), folder)
            os._exit(0)
        pids.append(pid)
    ended_well = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids]
    assert all(ended_well), "a lane of the suite itself has died"
    assert len(outcomes(folder, part)) >= len(cases)


def keep(part: str, lane: int, outcome: Outcome, folder: Path) -> None:
    """Says what came of a case, and leaves it in the folder."""
    with open(folder / f"outcomes-{part}-{lane}.jsonl", "a") as file:
        file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    result = "survived" if not outcome.wrong else f"NOT SURVIVED: {'; '.join(outcome.wrong)}"
    print(f"{outcome.elapsed_s:6.1f} s  {outcome.name}: {result}", file=sys.stderr, flush=True)


def outcomes(folder: Path, part: str = "*") -> list[Outcome]:
    """What the parts that were run in a folder have left there."""
    paths = sorted(folder.glob(f"outcomes-{part}-*.jsonl"))
    return [Outcome(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def _play(play, case, number: int) -> Outcome:
    began_at = time.monotonic()
    try:
        outcome = play(case, number)
    except Exception:
        outcome = Outcome("the suite itself", str(case), [traceback.format_exc()])
    outcome.elapsed_s = time.monotonic() - began_at
    return outcome


def render(found: list[Outcome], options) -> str:
    """The table: a row for each kind of case, with how many of how many survived."""
    head = ("case", "survived", "detected after s", "first step after s", "steps redone", "seconds")
    lines = [" | ".join(("", *head, "")).strip(), "|---|---|---|---|---|---|"]
    for row in dict.fromkeys(outcome.row for outcome in found):
        of_row = [outcome for outcome in found if outcome.row == row]
        survived = sum(not outcome.wrong for outcome in of_row)
        cells = [row, f"{survived}/{len(of_row)}"]
        cells += [_spread([getattr(outcome, name) for outcome in of_row]) for name in ("detected_s", "restarted_s")]
        cells.append(_spread([outcome.steps_redone for outcome in of_row], digits=0))
        cells.append(f"{sum(outcome.elapsed_s for outcome in of_row):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    survived = sum(not outcome.wrong for outcome in found)
    lines.append(f"| all | {survived}/{len(found)} |  |  |  | {sum(o.elapsed_s for o in found):.0f} |")
    lines += ["", *(outcome.name for outcome in found if outcome.row == "soak: its end")]
    lost = [f"- not survived: {outcome.name}" for outcome in found if outcome.wrong]
    lines += ["", *lost] if lost else []
    about = f"`make test-faults`, seed {options.seed}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}. {ABOUT}"
    return "\n".join([about, "", *lines])


def _spread(values: list[float | None], digits: int = 1) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    p95 = known[min(len(known) - 1, int(0.95 * len(known)))]
    return " / ".join(f"{value:.{digits}f}" for value in (middle(known), p95, known[-1]))


def write(text: str) -> None:
    """Puts the table into docs/results.md, in the place of an earlier one."""
    path = ROOT / "docs/results.md"
    results = path.read_text()
    section = f"{HEADING}\n{text}\n"
    pattern = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(results):
        results = pattern.sub(lambda _: section + "\n", results)
    else:
        results = results.rstrip() + "\n\n" + section
    path.write_text(results.rstrip() + "\n")
