"""Look at what was packed before a model is trained on it: pictures, measures, what is unlike the rest.

1. measure every scan: how much head there is, how bright, how well it stands out, what is cut off or empty;
2. compare it with its cohort, and find images that are there twice: outliers.csv, the worst first;
3. draw the worst and a random sample of each cohort: index.html, one file that needs no network, and pages/*.jpg.

The page, the pictures and outliers.csv show heads and ids: they are protected health data like the shards.

Examples:
    python -m sharding.quality shards/ --out qc/
    python -m sharding.quality shards/ --out qc/ --max-mads 8 --max-pictures 300
"""

import csv
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import tyro

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to look at."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder that sharding.build wrote."""
    out: Path
    """Folder of the page, the pictures and the table; made if missing, files of the same name are replaced."""
    max_mads: float = 6.0
    """Flag what is further from its cohort's median than this many median absolute deviations; 6 is about 4 sd."""
    max_pictures: int = 1000
    """Scans with a picture: the worst, up to half of them, and a random sample of each cohort."""
    workers: int | None = None
    """Processes. As many as this job has cores unless given."""


def look(options: Options) -> tuple[int, int]:
    """Writes outliers.csv, pages/*.jpg and index.html; returns how many scans there are and how many are flagged.

    Raises:
        ValueError: the folder of shards is not finished, a sample is damaged, or an option is out of range.
    """
    import numpy as np

    from sharding.outliers import judge
    from sharding.packed import measure, read_packed
    from sharding.quality_page import draw_tile, write_page, write_sheets

    if (options.workers or 1) < 1 or options.max_pictures < 0 or options.max_mads <= 0:
        raise ValueError("--workers must be at least 1, --max-pictures 0, --max-mads more than 0")
    scans = read_packed(options.shards)
    if not scans:
        raise ValueError(f"{options.shards / 'index.json'} holds no scan")
    options.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is said now, not after hours
    context = get_context("forkserver")
    context.set_forkserver_preload(["sharding.quality_page"])
    with ProcessPoolExecutor(options.workers or len(os.sched_getaffinity(0)), context) as pool:
        measures, thumbnails = [], np.empty((len(scans), 512), np.float32)
        for row, (found, thumbnail_XYZ) in enumerate(_each(pool, measure, scans, "measured")):
            measures.append(found)
            thumbnails[row] = thumbnail_XYZ.ravel()
        judged = judge(scans, measures, thumbnails, options.max_mads)
        _write_table(options.out / "outliers.csv", judged)

        shown = choose(judged, options.max_pictures)
        tiles = list(_each(pool, draw_tile, [one.scan for one in shown], "drawn"))
    write_sheets(options.out / "pages", shown, tiles)
    write_page(options.out / "index.html", judged, {one.scan.key: tile for one, tile in zip(shown, tiles, strict=True)})
    if len(shown) < len(scans):
        log.info("pictures of %d of %d scans; --max-pictures changes that", len(shown), len(scans))
    return len(scans), sum(bool(one.flags) for one in judged)


def choose(judged: list, max_pictures: int) -> list:
    """Who gets a picture, in the order of `judged`, worst first: all, or the worst and a sample of each cohort.

    Half of the places go to the worst, the other half to the cohorts in turn, at random but the same every time.
    """
    worst, others = judged[: max_pictures // 2], judged[max_pictures // 2 :]
    random.Random(0).shuffle(others)
    turns: Counter = Counter()
    in_turn = []
    for one in others:
        turns[one.scan.cohort] += 1
        in_turn.append((turns[one.scan.cohort], one))
    in_turn.sort(key=lambda turn: turn[0])
    keys = {one.scan.key for one in worst} | {one.scan.key for _, one in in_turn[: max_pictures - len(worst)]}
    return [one for one in judged if one.scan.key in keys]


def _each(pool: ProcessPoolExecutor, work: Callable, scans: list, what: str) -> Iterator:
    from tqdm import tqdm

    results = pool.map(work, scans, chunksize=8)
    return tqdm(results, desc=what, total=len(scans), unit="scan", disable=not sys.stderr.isatty())


def _write_table(path: Path, judged: list) -> None:
    from sharding.outliers import MEASURES

    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["scan", "key", "cohort", "diagnosis", "split", "score_mad", *MEASURES, "flags"])
        for one in judged:
            scan, numbers = one.scan, [f"{one.measures[name]:.6g}" for name in MEASURES]
            about = [scan.name, scan.key, scan.cohort, scan.diagnosis, scan.split, f"{one.score:.1f}"]
            rows.writerow([*about, *numbers, "; ".join(one.flags)])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        num_scans, num_flagged = look(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a worker died; if memory ran out, give fewer --workers")
    log.info("ok %d scans, %d flagged -> %s", num_scans, num_flagged, options.out / "outliers.csv")
    print(options.out / "index.html")


if __name__ == "__main__":
    main()
