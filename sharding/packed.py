"""One scan of a finished folder of shards: where it lies, its voxels, and what can be measured on them."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from medblip.volume import place

COARSE_MM = 4.0  # measured on means of blocks of about this edge: they quieten noise
THUMBNAIL_EDGE = 8


@dataclass(frozen=True)
class PackedScan:
    """One sample of index.json, with its shard."""

    name: str
    """scan_id where split.csv tells it, else KEY."""
    key: str
    cohort: str
    subject: str
    """Hashed."""
    diagnosis: str
    """Empty if unknown."""
    split: str
    fingerprint: str
    """Of the voxels: the same image, the same fingerprint."""
    shard: Path
    volume: tuple[int, int]
    """Offset and size in the shard, as `record`."""
    record: tuple[int, int]
    shape: tuple[int, int, int]
    pad_before: tuple[int, int, int]
    codec: str
    grid_size: int

    def read_voxels(self) -> np.ndarray:
        """The stored part of the grid: uint8, X Y Z in RAS+.

        Raises:
            ValueError: the sample does not decode to its shape.
        """
        packed = self._read(*self.volume)
        try:
            voxels = packed if self.codec == "raw" else zstandard.ZstdDecompressor().decompress(packed)
            return np.frombuffer(voxels, np.uint8).reshape(self.shape)
        except (zstandard.ZstdError, ValueError) as error:
            advice = f"run python -m sharding.verify {self.shard.parent}"
            raise ValueError(f"{self.shard}: sample {self.key} is damaged ({error}); {advice}") from None

    def read_grid(self) -> np.ndarray:
        """The whole grid, as the model gets it: uint8, X Y Z in RAS+.

        Raises:
            ValueError: as `read_voxels`.
        """
        return place(self.read_voxels(), self.pad_before, self.grid_size)

    def read_spacing_mm(self) -> tuple[float, float, float]:
        """Edges of a voxel, from the sample's record."""
        return tuple(json.loads(self._read(*self.record))["spacing_mm"])

    def _read(self, offset: int, size: int) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


def read_packed(folder: Path) -> list[PackedScan]:
    """All scans of a folder of shards, in the order of index.json.

    Raises:
        ValueError: the folder is not a finished folder of shards.
    """
    if not (folder / "index.json").is_file():
        raise ValueError(f"{folder / 'index.json'} is missing: not a finished folder of shards; run sharding.build")
    index = json.loads((folder / "index.json").read_bytes())
    names = _names(folder / "split.csv")
    return [
        PackedScan(
            name=names.get(sample["key"], sample["key"]),
            key=sample["key"],
            cohort=sample["cohort"],
            subject=sample["subject"],
            diagnosis=sample["diagnosis"] or "",
            split=shard["split"],
            fingerprint=sample["fingerprint"],
            shard=folder / shard["name"],
            volume=tuple(sample["volume"]),
            record=tuple(sample["record"]),
            shape=tuple(sample["shape"]),
            pad_before=tuple(sample["pad_before"]),
            codec=index["codec"],
            grid_size=index["recipe"]["size"],
        )
        for shard in index["shards"]
        for sample in shard["samples"]
    ]


def _names(split_csv: Path) -> dict[str, str]:
    """KEY to scan_id; empty if split.csv was left out on purpose, for it holds ids in clear."""
    if not split_csv.is_file():
        return {}
    with open(split_csv, encoding="utf-8", newline="") as file:
        return {row["key"]: row["scan_id"] for row in csv.DictReader(file) if row.get("key")}


def measure(scan: PackedScan) -> tuple[dict[str, float], np.ndarray]:
    """What `sharding.outliers` compares, by name, and a thumbnail of the grid, 8 x 8 x 8 float32.

    `foreground_ml`: what is brighter than air. `mean`, `p90`: its intensities, 0..255. `contrast`: how well air and
    head separate, 0..1. `entropy_bits`: of its grey levels. `empty_slices`: share of the grid's slices, along all
    three axes, without any of it. `cut`: the largest share of one side of the image that it covers, the lower side,
    where a neck is cut, apart.

    Raises:
        ValueError: the sample is damaged.
    """
    spacing_mm = scan.read_spacing_mm()
    part_XYZ = scan.read_voxels()
    block = [max(1, round(COARSE_MM / spacing)) for spacing in spacing_mm]
    coarse_XYZ = block_means(part_XYZ, block)
    threshold, contrast = _separate(coarse_XYZ)
    is_head = coarse_XYZ > threshold
    every_second = part_XYZ[::2, ::2, ::2]
    levels = np.bincount(every_second[every_second > threshold], minlength=256)
    levels = levels if levels.any() else np.eye(256, dtype=int)[0]
    share = levels[levels > 0] / levels.sum()
    sides = [part_XYZ[: block[0]], part_XYZ[-block[0] :], part_XYZ[:, : block[1]], part_XYZ[:, -block[1] :]]
    sides = [side.mean(axis=n // 2) for n, side in enumerate(sides)] + [part_XYZ[..., -block[2] :].mean(axis=2)]
    filled = sum(is_head.any(axis=tuple({0, 1, 2} - {axis})).sum() * block[axis] for axis in range(3))
    measures = {
        "foreground_ml": float(is_head.sum() * np.prod(block) * np.prod(spacing_mm) / 1000),
        "mean": float(levels @ np.arange(256) / levels.sum()),
        "p90": float(np.searchsorted(np.cumsum(levels), 0.9 * levels.sum())),
        "contrast": contrast,
        "entropy_bits": float(-(share @ np.log2(share))),
        "empty_slices": max(0.0, 1 - float(filled) / (3 * scan.grid_size)),
        "cut": max(float((side > threshold).mean()) for side in sides),
    }
    grid_XYZ = place(part_XYZ, scan.pad_before, scan.grid_size)
    return measures, block_means(grid_XYZ, [max(1, scan.grid_size // THUMBNAIL_EDGE)] * 3)[:8, :8, :8]


def block_means(volume_XYZ: np.ndarray, block: list[int]) -> np.ndarray:
    """Means of whole blocks, float32; what is left over at the far sides is dropped."""
    sums = volume_XYZ
    for axis, size in enumerate(block):
        sums = np.moveaxis(sums, axis, 0)
        whole = max(1, len(sums) // size) * size
        slices = [sums[first:whole:size] for first in range(min(size, len(sums)))]
        total = slices[0].astype(np.uint32)
        for following in slices[1:]:  # whole slices, not a reduction over a short axis: ten times as fast
            total += following
        sums = np.moveaxis(total, 0, axis)
    return sums.astype(np.float32) / np.float32(np.prod(block))


def _separate(coarse_XYZ: np.ndarray) -> tuple[float, float]:
    """Otsu's threshold between air and head, and its share of the variance that lies between the two, 0..1.

    Source: Otsu 1979, IEEE Trans. SMC 9(1):62-66.
    """
    share = np.bincount(np.rint(coarse_XYZ).astype(int).ravel(), minlength=256) / coarse_XYZ.size
    below, values = np.cumsum(share), np.arange(256)
    moment = np.cumsum(share * values)
    variance = share @ (values - moment[-1]) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num((moment[-1] * below - moment) ** 2 / (below * (1 - below)))
    split = int(np.argmax(between[:-1]))
    return split + 0.5, float(between[split] / variance) if variance > 0 else 0.0
