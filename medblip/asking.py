"""The two steps that cost time in an evaluation: every scan is encoded once, and every different question asked once.

N scans or asks, Q queries, C width, O options. Used by `medblip evaluate` and by the validation during training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medblip.arms import BLANK, Ask, Asked, ask_diagnosis, classes_of, offered_of
from medblip.config import EhrTier
from medblip.inference import Asker
from medblip.scoring import Options
from medblip.shards import READ_AHEAD, Reader, Sample
from medblip.share import Crew
from medblip.text import DIAGNOSIS_ANSWERS, render_record

ASKS_PER_SCAN = 4
"""Asks at a time for each scan at a time: a prompt is short beside a volume's patches."""


class Scan(NamedTuple):
    """A sample with its record; the record never leaves the evaluation as text."""

    sample: Sample
    fields: dict
    report: str
    extent_mm: tuple[float, float, float]


class Scores(NamedTuple):
    """What came of one ask: the options' log-likelihoods, and the option that the model would write (None: another)."""

    logp: list[float]
    written: int | None


class Diagnosed(NamedTuple):
    """What came of the question for the diagnosis, ask by ask."""

    asked: list[Asked]
    classes: list[str]
    """The diagnoses that occur."""
    offered: list[str]
    """Those that were offered as answers, in the order of the options."""
    options: Options
    logp_NO: NDArray
    written: list[int | None]
    """The option that the model would write."""
    notes: list[str]
    """On arms that were left out."""


@dataclass(frozen=True)
class Interview:
    """Encoded scans and a model that can be asked about them."""

    asker: Asker
    scans: list[Scan]
    queries_NQC: Tensor
    """Of the scans, on the CPU."""
    tier: EhrTier
    batch: int
    """Asks at a time."""
    crew: Crew

    def records(self, rows: list[int]) -> list[str]:
        """The records of these scans as text, at the tier."""
        return [render_record(self.scans[row].fields, self.scans[row].report, self.tier) for row in rows]

    def score(self, asks: list[Ask], answers: tuple[str, ...]) -> dict[Ask, Scores]:
        """Scores these options under each ask; equal asks are asked once."""

        def do(some: list[Ask]) -> list[Scores]:
            reads_image = some[0].image is not None
            logp_BO, is_written_BO = self.asker.score_options(*self._inputs(some), answers, reads_image)
            return [
                Scores(logp_O.tolist(), int(is_written_O.long().argmax()) if is_written_O.any() else None)
                for logp_O, is_written_O in zip(logp_BO, is_written_BO, strict=True)
            ]

        return self._each(asks, do, "asking")

    def diagnose(self, rows: list[int], arms: tuple[str, ...], seed: int) -> Diagnosed:
        """Asks for the diagnosis of these scans, taken as one cohort, in these arms; `seed` shuffles."""
        samples = [self.scans[row].sample for row in rows]
        classes = classes_of(sample.diagnosis for sample in samples)
        offered = offered_of(classes)
        answers = tuple(DIAGNOSIS_ANSWERS[name] for name in offered)
        subjects = [sample.subject for sample in samples]
        asked, notes = ask_diagnosis(arms, rows, subjects, self.records(rows), seed)
        found = self.score([one.ask for one in asked], answers)
        logp_NO = np.array([found[one.ask].logp for one in asked])
        written = [found[one.ask].written for one in asked]
        return Diagnosed(asked, classes, offered, self.asker.options(answers), logp_NO, written, notes)

    def write(self, asks: list[Ask]) -> dict[Ask, str]:
        """The model's own words to each ask; equal asks are asked once."""

        def do(some: list[Ask]) -> list[str]:
            return self.asker.answer(*self._inputs(some), some[0].image is not None)

        return self._each(asks, do, "writing")

    def _each(self, asks: list[Ask], do: Callable[[list[Ask]], list], what: str) -> dict[Ask, Any]:
        """Prompts of a length go together; asks with and without an image apart."""
        batches: list[list[Ask]] = []
        for ask in sorted(set(asks), key=lambda ask: (ask.image is None, len(ask.prompt), *map(str, ask))):
            if not batches or len(batches[-1]) == self.batch or (batches[-1][0].image is None) != (ask.image is None):
                batches.append([])
            batches[-1].append(ask)
        found = self.crew.share(batches, do, what=what)
        return dict(zip(itertools.chain(*batches), itertools.chain(*found), strict=True))

    def _inputs(self, some: list[Ask]) -> tuple[Tensor, list[str]]:
        queries_BQC = self.queries_NQC[[0 if ask.image in (None, BLANK) else ask.image for ask in some]]
        for place, ask in enumerate(some):
            if ask.image == BLANK:
                queries_BQC[place] = self.asker.blank_QC.cpu()
        return queries_BQC, [ask.prompt for ask in some]


def encode(asker: Asker, reader: Reader, samples: list[Sample], tier: EhrTier, batch: int, crew: Crew) -> Interview:
    """Reads every sample and encodes it once."""

    def read(start: int) -> tuple[list[Scan], Tensor]:
        some = samples[start : start + batch]
        flat = torch.empty(sum(sample.num_voxels for sample in some), dtype=torch.uint8)
        reader.expect(sample.shard for sample in samples[start : start + batch + READ_AHEAD])
        reader.volumes(some, flat.numpy())
        return [_scan(reader, sample) for sample in some], asker.volumes(flat, some)

    def do(ready: tuple[list[Scan], Tensor]) -> tuple[list[Scan], Tensor]:
        scans, volume_BXYZ = ready
        return scans, asker.encode(volume_BXYZ).cpu()

    found = crew.share(list(range(0, len(samples), batch)), do, read, "encoding")
    scans = [scan for some, _ in found for scan in some]
    queries_NQC = torch.cat([queries_BQC for _, queries_BQC in found])
    return Interview(asker, scans, queries_NQC, tier, ASKS_PER_SCAN * batch, crew)


def _scan(reader: Reader, sample: Sample) -> Scan:
    record = reader.record(sample)
    extent_mm = tuple(n * edge_mm for n, edge_mm in zip(record["shape"], record["spacing_mm"], strict=True))
    return Scan(sample, record["fields"], record["report"], extent_mm)
