"""Writes made-up releases of the seven studies, laid out as they are downloaded, with made-up brains in them.

1. people are drawn for each study, a third of them with each diagnosis (MIRIAD has no MCI);
2. every visit's scan is rendered once, by several processes;
3. each release's writer (sharding/releases/NAME.py) puts scans and tables where that study has them.

AIBL and MIRIAD come from another scanner than the rest: they are the cohorts to be tested on.

Example:
    python -m sharding.releases --out releases/
    python -m sharding.manifest adni --images releases/adni/images --tables releases/adni/tables --out adni.csv
"""

import importlib
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from sharding.madeup import Options as Drawing
from sharding.madeup import draw_patient, load_template, render_scan, write_oriented
from sharding.people import Exam, Volunteer, draw_volunteers


class Study(NamedTuple):
    """How many of the people are in a study, how often they come, and to which scanner (see sharding.madeup)."""

    cohort: str
    share: float
    exams: int
    scanner: str


STUDIES = {
    "adni": Study("ADNI", 0.26, 1, "A"),
    "nacc": Study("NACC", 0.20, 1, "A"),
    "oasis1": Study("OASIS1", 0.12, 1, "A"),
    "oasis2": Study("OASIS2", 0.05, 2, "A"),
    "oasis3": Study("OASIS3", 0.09, 1, "A"),
    "aibl": Study("AIBL", 0.15, 1, "B"),
    "miriad": Study("MIRIAD", 0.13, 1, "B"),
}


@dataclass(frozen=True)
class Options:
    """Write made-up releases: OUT/NAME for each study."""

    out: Path
    """Folder to write to; the studies' folders in it are replaced."""
    subjects: int = 300
    """People in all studies together."""
    effect: float = 1.0
    """Strength of the disease in the images; 0 leaves no disease signal at all, 2 is easy."""
    seed: int = 0
    """Another seed, other people."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes."""

    def __post_init__(self):
        if self.subjects < 60:
            raise ValueError(f"--subjects must be at least 60, so that every study has some, not {self.subjects}")


def write_releases(options: Options) -> list[Path]:
    """Writes all studies and returns their folders."""
    from tqdm import tqdm

    people = {name: _people(study, options) for name, study in STUDIES.items()}
    rendered = options.out / ".rendered"
    jobs = [
        (_drawing(name, options), volunteer.number, exam.number, _rendered(rendered, name, volunteer, exam))
        for name, volunteers in people.items()
        for volunteer in volunteers
        for exam in volunteer.exams
    ]
    rendered.mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(options.workers, get_context("spawn"), _start_worker, (load_template(),)) as pool:
        list(tqdm(pool.map(_render, jobs, chunksize=4), total=len(jobs), desc="scans", disable=None))
    folders = []
    for name, volunteers in people.items():
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        writer = importlib.import_module(f"sharding.releases.{name}")
        writer.write(volunteers, folder, _saver(rendered, name))
        folders.append(folder)
    shutil.rmtree(rendered)
    return folders


def _people(study: Study, options: Options) -> list[Volunteer]:
    count = max(3, round(options.subjects * study.share))
    if study.cohort != "MIRIAD":
        return draw_volunteers(study.cohort, count, study.exams, options.seed)
    drawn = draw_volunteers(study.cohort, -(-count * 3 // 2), study.exams, options.seed)
    return [volunteer for volunteer in drawn if volunteer.exams[0].diagnosis != "MCI"]


def _drawing(name: str, options: Options) -> Drawing:
    study = STUDIES[name]
    return Drawing(
        out=options.out, effect=options.effect, seed=options.seed, cohort=study.cohort, scanner=study.scanner
    )


def _rendered(folder: Path, name: str, volunteer: Volunteer, exam: Exam) -> Path:
    return folder / f"{name}-{volunteer.number}-{exam.number}.nii"


def _saver(rendered: Path, name: str):
    def save(path: Path, volunteer: Volunteer, exam: Exam, axes: str) -> None:
        import nibabel as nib

        write_oriented(path, nib.load(_rendered(rendered, name, volunteer, exam)), axes)

    return save


def _start_worker(template) -> None:
    import torch

    torch.set_num_threads(1)  # the processes already fill the cores
    global _template
    _template = template


def _render(job: tuple[Drawing, int, int, Path]) -> None:
    drawing, subject, session, path = job
    patient = draw_patient(drawing.seed, drawing.cohort, subject)
    image, _ = render_scan(_template, patient, drawing, subject, session)
    image.to_filename(path)


def main() -> None:
    import tyro

    options = tyro.cli(Options, prog="python -m sharding.releases", description=__doc__)
    try:
        folders = write_releases(options)
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, folders)))
