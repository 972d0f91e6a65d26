"""Pictures of a run: the scans it sees and how its losses fell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medblip.shards import Reader, Sample, ShardIndex
from medblip.volume import place

GREY, BLUE, ORANGE, GREEN = "#666666", "#1f77b4", "#d95f02", "#2a9d5c"


def draw_montage(data: str | Path, split: str, path: str | Path, per_diagnosis: int = 3) -> None:
    """A few scans of each diagnosis as the model gets them: axial, coronal and sagittal, with KEY and diagnosis."""
    import matplotlib.pyplot as plt

    index = ShardIndex(data)
    reader = Reader(index, threads=1)
    samples = index.samples(split)
    rows = [[s for s in samples if s.diagnosis == name][:per_diagnosis] for name in ("CN", "MCI", "AD")]
    rows = [row for row in rows if row]
    figure, axes = plt.subplots(
        len(rows), per_diagnosis, figsize=(4.2 * per_diagnosis, 1.75 * len(rows)), squeeze=False, facecolor="black"
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, found in enumerate(rows):
        for column, sample in enumerate(found):
            axes[row, column].imshow(three_planes(reader, sample), cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_title(f"{sample.diagnosis}   {sample.key}", color="white", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110, facecolor="black")
    plt.close(figure)
    reader.close()


def three_planes(reader: Reader, sample: Sample) -> NDArray[np.uint8]:
    """A scan as the model gets it, cut through its middle: axial, coronal and sagittal side by side."""
    flat = np.empty(sample.num_voxels, np.uint8)
    reader.volumes([sample], flat)
    volume_XYZ = place(flat.reshape(sample.shape), sample.pad_before, reader.index.grid_size)
    x, y, z = (n // 2 for n in volume_XYZ.shape)
    planes = [volume_XYZ[:, :, z], volume_XYZ[:, y], volume_XYZ[x]]
    return np.concatenate([plane.T[::-1] for plane in planes], axis=1)


def draw_scan(reader: Reader, sample: Sample, path: Path) -> None:
    """The same as a picture, one pixel a voxel."""
    import matplotlib.image

    matplotlib.image.imsave(path, three_planes(reader, sample), cmap="gray", vmin=0, vmax=255)


def draw_losses(metrics: str | Path, path: str | Path) -> None:
    """The loss curves of a run's metrics.jsonl: each step faint, its running mean on top."""
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    curves = [
        ("loss_lm", "answer (language loss)", BLUE),
        ("loss_itc_answer", "image - answer contrast", ORANGE),
        ("loss_itc_record", "image - record contrast", GREEN),
    ]
    curves = [curve for curve in curves if curve[0] in records[0]]
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False)
    steps = np.array([record["step"] for record in records])
    window = max(1, len(steps) // 20)
    for axis, (name, title, color) in zip(axes[0], curves, strict=True):
        values = np.array([record[name] for record in records])
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps[window - 1 :], mean, color=color, linewidth=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", color=GREY)
        # The first steps of an untrained model would squeeze the rest of the curve.
        axis.set_ylim(0, np.quantile(values, 0.98) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
