"""The command line of the fault suite.

A table is made of all parts that were run in one --folder, by one call or by several: what was played there is not
played again. `report` makes the table without playing anything.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from faults import cells, inputs, launchers, planted, soak, table, worlds
from faults.cells import Bench
from faults.ranks import make_shards, preload

PARTS = ("matrix", "launchers", "inputs", "worlds", "planted", "soak")


def main() -> int:
    """Runs the parts that were asked for; 0 if every case survived."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="The fault suite.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; without any: all; or report")
    parser.add_argument("--seed", type=int, default=0, help="decides steps, ranks, order and times of the faults")
    parser.add_argument("--cells", type=int, help="only the first so many cases of each part")
    parser.add_argument("--kills", type=int, default=40, help="kills of the soak")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="only cases whose name fits, like '*SIGKILL*'"
    )
    parser.add_argument("--lanes", type=int, default=1, help="cases at a time")
    parser.add_argument("--folder", type=Path, help="where to work; what did not survive is left there")
    parser.add_argument("--write", action="store_true", help="write the table into docs/results.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - {*PARTS, "report"}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, in {folder}", file=sys.stderr, flush=True)
    if options.parts != ["report"]:
        preload()
        bench = Bench(folder, make_shards(folder))
        bench.undisturbed(cells.LAYOUT)
        for part in options.parts or PARTS:
            run_part(part, options, bench)
    found = table.outcomes(folder)
    text = table.render(found, options)
    print(text)
    if options.write:
        table.write(text)
    return 0 if found and not any(outcome.wrong for outcome in found) else 1


def run_part(part: str, options: argparse.Namespace, bench: Bench) -> None:
    """Plays the cases of one part whose names fit."""
    folder = bench.folder
    if part == "soak":
        for outcome in soak.soak(bench, options.kills, options.seed):
            table.keep(part, 0, outcome, folder)
        return
    if part == "matrix":
        cases, play = cells.matrix(options.seed), functools.partial(cells.play, bench)
        if any(cells.layout_of(case) == cells.VALIDATED for case in chosen(cases, options)):
            bench.undisturbed(cells.VALIDATED)
    elif part == "launchers":
        cases, play = launchers.all_launched(options.seed), functools.partial(launchers.play, bench)
    elif part == "inputs":
        cases, play = inputs.all_cases(), functools.partial(inputs.play, bench, inputs.begun_run(bench))
        if not inputs.may_mount(folder / "mount"):
            print("not allowed to mount a file system: its cases are left out", file=sys.stderr)
            cases = [case for case in cases if not case.mount]
    elif part == "worlds":
        cases, play = worlds.WAYS, functools.partial(worlds.play, bench)
    elif part == "planted":
        cases, play = planted.PLANTS, functools.partial(planted.play, bench)
    table.in_lanes(part, chosen(cases, options), play, options.lanes, folder)


def chosen(cases: Sequence, options: argparse.Namespace) -> list:
    """The cases that were asked for."""
    return [case for case in cases if any(fnmatch.fnmatch(case.name, p) for p in options.only)][: options.cells]


if __name__ == "__main__":
    sys.exit(main())
