"""The command line of the fault suite."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
import tempfile
from pathlib import Path

from faults import cells, inputs, launchers, table
from faults.cells import Bench
from faults.ranks import make_shards, preload

PARTS = ("matrix", "launchers", "inputs", "worlds", "planted", "soak")


def main() -> int:
    """Runs the parts that were asked for; 0 if every case survived."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="The fault suite.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; without any: all")
    parser.add_argument("--seed", type=int, default=0, help="decides steps, ranks, order and times of the faults")
    parser.add_argument("--cells", type=int, help="only so many cells of the matrix")
    parser.add_argument("--kills", type=int, default=40, help="kills of the soak")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only cases whose name fits, like '*SIGKILL*'")
    parser.add_argument("--lanes", type=int, default=1, help="cases at a time")
    parser.add_argument("--folder", type=Path, help="where to work; what did not survive is left there")
    parser.add_argument("--write", action="store_true", help="write the table into docs/results.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, in {folder}", file=sys.stderr, flush=True)
    preload()
    bench = Bench(folder, make_shards(folder))
    outcomes = []
    for part in options.parts or PARTS:
        outcomes += run_part(part, options, bench)
    text = table.render(outcomes, options)
    print(text)
    if options.write:
        table.write(text)
    return 0 if not any(outcome.wrong for outcome in outcomes) else 1


def run_part(part: str, options: argparse.Namespace, bench: Bench) -> list[table.Outcome]:
    """Plays the cases of one part whose names fit."""
    if part == "matrix":
        bench.undisturbed(cells.LAYOUT)
        cases = [cell for cell in cells.matrix(options.seed) if fnmatch.fnmatch(cell.name, options.only)]
        cases = cases[: options.cells]
        return table.in_lanes(cases, functools.partial(cells.play, bench), options.lanes, bench.folder)
    if part == "launchers":
        bench.undisturbed(cells.LAYOUT)
        cases = [case for case in launchers.all_launched(options.seed) if fnmatch.fnmatch(case.name, options.only)]
        return table.in_lanes(cases, functools.partial(launchers.play, bench), options.lanes, bench.folder)
    if part == "inputs":
        bench.undisturbed(cells.LAYOUT)
        begun = inputs.begun_run(bench)
        cases = [case for case in inputs.all_cases() if fnmatch.fnmatch(case.name, options.only)]
        if not inputs.may_mount(bench.folder / "mount"):
            print("not allowed to mount a file system: left out are its cases", file=sys.stderr)
            cases = [case for case in cases if not case.mount]
        return table.in_lanes(cases, functools.partial(inputs.play, bench, begun), options.lanes, bench.folder)
    raise AssertionError(part)


if __name__ == "__main__":
    sys.exit(main())
