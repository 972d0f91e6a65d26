"""A brain image becomes the uint8 volume that the model reads: one function, in training and in inference.

1. read it (medblip/image.py): scaled, as float32, turned to RAS+;
2. lay a cube grid over it (`standard`: in millimetres, around the head; `reference`: by voxel count);
3. map intensities to 0..255 and keep only the part of the grid that the image covers;
4. with a brain mask, do 2 and 3 for the brain alone and make the rest 0.

Arrays are X, Y, Z with x growing to the subject's Right, y to the Anterior, z to the Superior, end to end.
A rotation stays in the affine: voxels are resampled along their own axes, never turned.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from medblip.image import check_dtype, check_grid, read_image, turn_to_ras
from medblip.image import image_sha256 as image_sha256  # what a build needs of an image, in one place
from medblip.image import voxel_file as voxel_file

SAME_GRID_MM = 1e-3  # per voxel step, and in the position of voxel 0

COARSE_MM = 4.0  # the head is looked for in blocks of about this edge
AIR_FRACTION = 0.25  # head voxels are this far from the mean of the dark class to the mean of the bright one
SPECK_FRACTION = 0.03  # a slice belongs to the head if it has this share of the fullest slice's area
INTENSITY_SAMPLE_MM = 2.0  # percentiles are taken on every voxel at about this distance
ON_GRID = 1e-4  # voxels; a sampling position this close to a source voxel is that voxel
STANDARD_ONLY = ("low_percentile", "high_percentile", "margin_above_vertex_mm", "head_height_mm", "antialias_below")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the voxels of a prepared volume. A model and its data must have the same one.

    Raises:
        ValueError: a parameter is out of its range, or does not belong to the named recipe.
    """

    name: Literal["standard", "reference"]
    """`standard`: physical grid around the head. `reference`: longest side to `size` by voxel count, min-max."""
    size: int
    """Voxels along each edge of the cube grid."""
    spacing_mm: float | None = None
    """Edge of a grid voxel; `standard` only, None for `reference`."""
    low_percentile: float = 0.5
    """Percentile of the head's intensities that becomes 0 (`standard`)."""
    high_percentile: float = 99.5
    """Percentile of the head's intensities that becomes 255 (`standard`)."""
    margin_above_vertex_mm: float = 10.0
    """From the top of the head to the top of the grid (`standard`)."""
    head_height_mm: float = 150.0
    """How far below the vertex voxels count for centring and intensities: brain and skull, not neck (`standard`)."""
    antialias_below: float = 0.67
    """Average blocks first where the grid has fewer than this many voxels per source voxel (`standard`)."""
    brain_mask: bool = False
    """Whether everything outside a brain mask is 0, and only the brain counts for the grid and the intensities."""
    version: int = 1
    """Grows when the same parameters give other voxels."""

    def __post_init__(self):
        if self.name not in ("standard", "reference"):
            raise ValueError(f"recipe {self.name!r} is unknown; choose standard or reference")
        if not 8 <= self.size <= 1024:
            raise ValueError(f"recipe size {self.size} is not within 8..1024 voxels")
        if self.name == "reference" and self.spacing_mm is not None:
            raise ValueError(f"the reference recipe has no spacing_mm (got {self.spacing_mm}); it counts voxels")
        if self.name == "standard" and not 0.1 <= (self.spacing_mm or 0) <= 20:
            raise ValueError(f"the standard recipe needs spacing_mm within 0.1..20 mm, got {self.spacing_mm}")
        if not 0 <= self.low_percentile < self.high_percentile <= 100:
            raise ValueError(
                f"percentiles {self.low_percentile}, {self.high_percentile} are not 0 <= low < high <= 100"
            )
        if self.version != 1:
            raise ValueError(f"recipe version {self.version} is not known to this medblip, which prepares version 1")

    @property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of `to_dict()`."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict:
        """All parameters that this recipe uses, ready for JSON."""
        values = dataclasses.asdict(self)
        return values if self.name == "standard" else {k: v for k, v in values.items() if k not in STANDARD_ONLY}

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming every unknown and every missing key.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if values.get("name") == "reference":
            known = [name for name in known if name not in STANDARD_ONLY]
        unknown, missing = sorted(set(values) - set(known)), [name for name in known if name not in values]
        if unknown or missing:
            raise ValueError(f"recipe has unknown keys {unknown} and misses {missing}; known are {known}")
        return cls(**values)


@dataclass(frozen=True)
class Prepared:
    """One volume, ready to be stored or read by the model."""

    volume_XYZ: np.ndarray
    """uint8, RAS+, C-contiguous: the part of the size^3 grid that the image covers."""
    pad_before: tuple[int, int, int]
    """Grid voxel at which `volume_XYZ` begins; the rest of the grid is 0."""
    spacing_mm: tuple[float, float, float]
    """Distance between neighbouring voxels of `volume_XYZ`."""
    affine: np.ndarray
    """float64 (4, 4): voxel indices of `volume_XYZ` to world mm, so that overlays find their way back."""
    intensity_low: float
    """The image's intensity that became 0; darker ones are 0 as well."""
    intensity_high: float
    """The image's intensity that became 255; brighter ones are 255 as well."""
    source_shape: tuple[int, int, int]
    """Voxels of the image along its RAS+ axes."""


def prepare(path: str | Path, recipe: Recipe, mask: str | Path | None = None) -> Prepared:
    """Reads an image and prepares it: the way of every scan, into a shard or into an answer.

    Args:
        path: an image file, or a folder that holds one DICOM series.
        recipe: says, among others, whether a mask is needed.
        mask: image on the same grid, more than 0 where the brain is.

    Raises:
        ValueError: the file is not one readable brain volume, the mask is not of it, or the recipe has no use for a
            mask or misses it; the message names the file and the reason.
    """
    if recipe.brain_mask and mask is None:
        raise ValueError(f"{path}: the recipe has brain_mask, so a mask of the brain is needed and none is given")
    if mask is not None and not recipe.brain_mask:
        raise ValueError(f"{path}: a mask is given, {mask}, and the recipe has no brain_mask")
    array_XYZ, affine = read_image(path)
    mask_XYZ = None if mask is None else _read_mask(path, mask, array_XYZ.shape, affine)
    try:
        return _prepare_ras(array_XYZ, affine, recipe, mask_XYZ)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def prepare_array(array_XYZ: np.ndarray, affine: np.ndarray, recipe: Recipe) -> Prepared:
    """Prepares voxels that are already in memory, with any axis order, given by `affine` (voxel to RAS+ mm).

    Raises:
        ValueError: as `prepare`, without a file to name.
    """
    affine = np.asarray(affine, dtype=np.float64)
    check_grid(array_XYZ.shape, affine)
    check_dtype(array_XYZ.dtype)
    if recipe.brain_mask:
        raise ValueError("the recipe has brain_mask; voxels in memory are prepared without one")
    return _prepare_ras(*turn_to_ras(array_XYZ, affine), recipe)


def place(volume_XYZ: np.ndarray, pad_before: tuple[int, int, int], size: int) -> np.ndarray:
    """The whole uint8 grid, size^3, with `volume_XYZ` where it belongs and 0 around it."""
    grid_XYZ = np.zeros((size, size, size), dtype=np.uint8)
    grid_XYZ[tuple(slice(pad, pad + n) for pad, n in zip(pad_before, volume_XYZ.shape, strict=True))] = volume_XYZ
    return grid_XYZ


def reference_resize(volume_XYZ: torch.Tensor, size: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Scales to [0, 1] by minimum and maximum and resizes the longest side to `size`, aligned corners.

    Returns the float32 volume, unpadded, and the grid voxel at which it begins; an odd voxel of padding goes to
    the far side. Axes are treated alike, so any axis order gives the same voxels.

    Raises:
        ValueError: the volume is so elongated that nothing would be left of a side.

    Source: Qybc/MedBLIP, medblip/dataset.py, resize and pad.
    """
    new_shape = [size * n // max(volume_XYZ.shape) for n in volume_XYZ.shape]
    if min(new_shape) == 0:
        raise ValueError(f"shape {tuple(volume_XYZ.shape)} is too elongated for a grid of {size} voxels")
    there, back = _memory_order(volume_XYZ)
    volume_XYZ = volume_XYZ.permute(there)
    low, high = volume_XYZ.aminmax()
    new = [new_shape[axis] for axis in there]
    resized = _interpolate(volume_XYZ, new, True)
    resized.sub_(low).div_(high - low)  # after resizing, which is linear: there are fewer voxels
    return resized.permute(back), tuple((size - n) // 2 for n in new_shape)


def _read_mask(path: str | Path, mask: str | Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The mask as float32, 1 in the brain and 0 outside, RAS+."""
    mask_XYZ, mask_affine = read_image(mask)
    if mask_XYZ.shape != shape or not np.allclose(mask_affine, affine, rtol=0, atol=SAME_GRID_MM):
        grids = [f"{name} has {s} voxels, affine {a.round(4).tolist()}"
                 for name, s, a in ((mask, mask_XYZ.shape, mask_affine), (path, shape, affine))]  # fmt: skip
        raise ValueError(f"{path}: the mask lies on another grid: {grids[0]}; {grids[1]}")
    if mask_XYZ.max() <= 0:
        raise ValueError(f"{path}: the mask {mask} is nowhere more than 0")
    return np.greater(mask_XYZ, 0, out=mask_XYZ)


def _prepare_ras(
    array_XYZ: np.ndarray, affine: np.ndarray, recipe: Recipe, mask_XYZ: np.ndarray | None = None
) -> Prepared:
    volume_XYZ = torch.from_numpy(array_XYZ)
    brain_XYZ = None if mask_XYZ is None else torch.from_numpy(mask_XYZ)
    if brain_XYZ is not None:
        volume_XYZ.masked_fill_(brain_XYZ == 0, volume_XYZ[brain_XYZ > 0].min())  # nothing of the outside seeps in
    if recipe.name == "standard":
        return _standard(volume_XYZ, affine, recipe, brain_XYZ)
    return _reference(volume_XYZ, affine, recipe, brain_XYZ)


def _reference(
    volume_XYZ: torch.Tensor, affine: np.ndarray, recipe: Recipe, brain_XYZ: torch.Tensor | None
) -> Prepared:
    resized_XYZ, pad_before = reference_resize(volume_XYZ, recipe.size)
    if brain_XYZ is not None:
        resized_XYZ[reference_resize(brain_XYZ, recipe.size)[0] < 0.5] = 0
    low, high = volume_XYZ.permute(_memory_order(volume_XYZ)[0]).aminmax()
    step = [(n - 1) / max(new - 1, 1) for n, new in zip(volume_XYZ.shape, resized_XYZ.shape, strict=True)]
    return Prepared(
        volume_XYZ=_to_uint8(resized_XYZ, 0.0, 1.0),
        pad_before=pad_before,
        affine=_regrid(affine, step, (0, 0, 0)),
        spacing_mm=_spacing_mm(_regrid(affine, step, (0, 0, 0))),
        intensity_low=low.item(),
        intensity_high=high.item(),
        source_shape=tuple(volume_XYZ.shape),
    )


def _standard(volume_XYZ: torch.Tensor, affine: np.ndarray, recipe: Recipe, brain_XYZ: torch.Tensor | None) -> Prepared:
    source_shape = tuple(volume_XYZ.shape)
    if brain_XYZ is not None:
        brain_XYZ, _ = _average_blocks(brain_XYZ, affine, recipe)
    volume_XYZ, affine = _average_blocks(volume_XYZ, affine, recipe)
    spacing_mm = _spacing_mm(affine)
    head = _find_head(volume_XYZ if brain_XYZ is None else brain_XYZ, spacing_mm, recipe.head_height_mm)

    # Where grid voxel 0 should lie, in source voxels: centred on the head, hung from above its top.
    step = [recipe.spacing_mm / spacing for spacing in spacing_mm]
    first = [(low + high - 1) / 2 - s * (recipe.size - 1) / 2 for (low, high), s in zip(head.box, step, strict=True)]
    top = head.box[2][1] - 0.5 + recipe.margin_above_vertex_mm / spacing_mm[2]
    first[2] = top - step[2] * (recipe.size - 0.5)
    axes = [_lay_axis(n, f, s, recipe.size) for n, f, s in zip(volume_XYZ.shape, first, step, strict=True)]
    if min(len(axis.positions) for axis in axes) == 0:
        raise ValueError(f"no voxel of the {recipe.size}-voxel grid falls into the image; is the voxel size right?")
    volume_XYZ = _sample(volume_XYZ, axes, step)
    inside_XYZ = None if brain_XYZ is None else _sample(brain_XYZ, axes, step).numpy() >= 0.5

    stride = max(1, round(INTENSITY_SAMPLE_MM / recipe.spacing_mm))
    blocks = [
        np.rint(axis.positions[::stride]).astype(int) // block for axis, block in zip(axes, head.block, strict=True)
    ]
    counts = head.mask[np.ix_(*blocks)]
    if inside_XYZ is not None:
        counts = inside_XYZ[::stride, ::stride, ::stride]
    intensities = volume_XYZ[::stride, ::stride, ::stride].numpy()[counts]
    if len(intensities) == 0:
        raise ValueError(f"the {recipe.size}-voxel grid misses the head; take a larger size or spacing_mm")
    low, high = np.percentile(intensities, [recipe.low_percentile, recipe.high_percentile])
    if low == high:
        raise ValueError(f"constant image: nearly all of the head is {low:g}")

    affine = _regrid(affine, step, [axis.positions[0] for axis in axes])
    grey_XYZ = _to_uint8(volume_XYZ, low, high)
    if inside_XYZ is not None:
        grey_XYZ[~inside_XYZ] = 0
    return Prepared(
        volume_XYZ=grey_XYZ,
        pad_before=tuple(axis.pad_before for axis in axes),
        spacing_mm=_spacing_mm(affine),
        affine=affine,
        intensity_low=float(low),
        intensity_high=float(high),
        source_shape=source_shape,
    )


def _average_blocks(volume_XYZ: torch.Tensor, affine: np.ndarray, recipe: Recipe) -> tuple[torch.Tensor, np.ndarray]:
    """Averages neighbours along the axes where the grid is much coarser than the image, so that none is skipped."""
    step = [recipe.spacing_mm / spacing for spacing in _spacing_mm(affine)]
    block = [max(1, round(s)) if 1 / s < recipe.antialias_below else 1 for s in step]
    if max(block) == 1:
        return volume_XYZ, affine
    block = [min(b, n) for b, n in zip(block, volume_XYZ.shape, strict=True)]
    return _pool(volume_XYZ, block, ceil_mode=False), _regrid(affine, block, [(b - 1) / 2 for b in block])


def _memory_order(volume_XYZ: torch.Tensor) -> tuple[list[int], list[int]]:
    """The permutation to axes in the order of memory, which is the file's, and the one back.

    Copying a volume into another axis order takes as long as resampling it, so the small result is turned instead.
    """
    there = sorted(range(3), key=lambda axis: -volume_XYZ.stride(axis))
    return there, [there.index(axis) for axis in range(3)]


def _interpolate(volume: torch.Tensor, shape: list[int], align_corners: bool, *scales: float) -> torch.Tensor:
    """Torch's trilinear interpolation, in memory of numpy's, which asks for huge pages: a third faster."""
    volume = torch.from_numpy(np.ascontiguousarray(volume.numpy()))[None, None]
    resized = torch.from_numpy(np.empty((1, 1, *shape), np.float32))
    torch.ops.aten.upsample_trilinear3d.out(volume, shape, align_corners, *scales, out=resized)
    return resized[0, 0]


def _pool(volume_XYZ: torch.Tensor, block: list[int], ceil_mode: bool) -> torch.Tensor:
    """Means of blocks of voxels."""
    there, back = _memory_order(volume_XYZ)
    block = [block[axis] for axis in there]
    return F.avg_pool3d(volume_XYZ.permute(there)[None, None], block, ceil_mode=ceil_mode)[0, 0].permute(back)


@dataclass(frozen=True)
class _Axis:
    """How one axis of the grid samples the image; everything in source voxels but `pad_before` and `skip`."""

    pad_before: int
    """Grid voxels before the image begins."""
    begin: int
    """First source voxel that is needed."""
    skip: int
    """Samples from `begin` on that do not lie between two source voxels, see `_lay_axis`."""
    positions: np.ndarray
    """Where the stored voxels sample the image."""


def _lay_axis(n: int, first: float, step: float, size: int) -> _Axis:
    """Lays `size` grid voxels, `step` apart, over `n` source voxels, as close to beginning at `first` as it can.

    Torch's interpolation samples at (j + 1/2) step - 1/2 from a whole source voxel on. The grid gives way by less
    than half a voxel to meet that, so sampling is exact, and an image of the grid's own spacing is copied, not
    blurred. Samples before the first voxel's centre, which torch would clamp, are skipped.
    """
    skip = max(0, math.ceil((1 - step) / (2 * step) - ON_GRID))
    lead = (step - 1) / 2 + skip * step
    if first > lead:
        begin, pad_before = round(first - lead), 0
    else:
        begin, pad_before = 0, round((lead - first) / step)
    inside = math.floor((n - 1 - begin - lead) / step + ON_GRID) + 1
    count = max(0, min(size - pad_before, inside))
    return _Axis(pad_before, begin, skip, begin + lead + step * np.arange(count))


def _sample(volume_XYZ: torch.Tensor, axes: list[_Axis], step: list[float]) -> torch.Tensor:
    """Linear interpolation at the axes' positions."""
    for number, axis in enumerate(axes):
        end = min(volume_XYZ.shape[number], math.floor(axis.positions[-1] + ON_GRID) + 2)
        volume_XYZ = volume_XYZ.narrow(number, axis.begin, end - axis.begin)
    # F.interpolate takes sizes or scales; exact positions for a free number of voxels need both.
    there, back = _memory_order(volume_XYZ)
    new_shape = [axes[n].skip + len(axes[n].positions) for n in there]
    scales = [1 / step[n] for n in there]
    sampled = _interpolate(volume_XYZ.permute(there), new_shape, False, *scales)
    return sampled.permute(back)[tuple(slice(axis.skip, None) for axis in axes)]


@dataclass(frozen=True)
class _Head:
    """Where the head is, in source voxels; `mask` says which blocks of `block` voxels it fills, holes included."""

    box: list[tuple[float, float]]
    mask: np.ndarray
    block: list[int]


def _find_head(volume_XYZ: torch.Tensor, spacing_mm: tuple[float, ...], head_height_mm: float) -> _Head:
    """Finds the head, or the brain if that is all there is, in block means.

    Means quieten noisy air. What is brighter than air is counted slice by slice, and the head is the run of well
    filled slices, so that specks, markers and wrapped-in pieces beside it do not count.
    """
    block = [max(1, round(COARSE_MM / spacing)) for spacing in spacing_mm]
    coarse_XYZ = _pool(volume_XYZ, block, ceil_mode=True).numpy()
    mask = coarse_XYZ > _air_threshold(coarse_XYZ)

    below, top = _main_run(mask.sum(axis=(0, 1)))
    height = math.ceil(head_height_mm / (block[2] * spacing_mm[2]))
    mask[:, :, : max(below, top - height)] = False
    runs = [_main_run(mask.sum(axis=(1, 2))), _main_run(mask.sum(axis=(0, 2))), (max(below, top - height), top)]
    inside = np.zeros_like(mask)
    inside[tuple(slice(*run) for run in runs)] = True

    n = volume_XYZ.shape
    box = [(low * b, min(high * b, n_axis)) for (low, high), b, n_axis in zip(runs, block, n, strict=True)]
    return _Head(box=box, mask=_fill(mask & inside), block=block)


def _air_threshold(coarse_XYZ: np.ndarray) -> float:
    """Otsu's threshold, lowered towards air so that dim skin and neck still count.

    Source: Otsu 1979, IEEE Trans. SMC 9(1):62-66.
    """
    coarse_XYZ = coarse_XYZ.astype(np.float64)
    low, high = coarse_XYZ.min(), np.percentile(coarse_XYZ, 99.9)
    if low == high:
        raise ValueError(f"constant image: nearly all of it is {low:g}")
    counts, edges = np.histogram(np.minimum(coarse_XYZ, high), bins=256, range=(low, high))
    values = (edges[:-1] + edges[1:]) / 2
    share = np.cumsum(counts) / counts.sum()
    moment = np.cumsum(counts * values) / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        separation = np.nan_to_num((moment[-1] * share - moment) ** 2 / (share * (1 - share)))
        split = int(np.argmax(separation[:-1]))
        dark, bright = moment[split] / share[split], (moment[-1] - moment[split]) / (1 - share[split])
    return dark + AIR_FRACTION * (bright - dark)


def _main_run(area: np.ndarray) -> tuple[int, int]:
    """First and one-past-last slice of the well filled ones around the fullest."""
    thin = np.flatnonzero(area <= SPECK_FRACTION * area.max())
    fullest = int(np.argmax(area))
    low = thin[thin < fullest].max(initial=-1) + 1
    high = thin[thin > fullest].min(initial=len(area))
    return int(low), int(high)


def _fill(mask: np.ndarray) -> np.ndarray:
    """Closes holes: a block is in if it lies between blocks of the mask along all three axes."""
    filled = np.ones_like(mask)
    for axis in range(3):
        before = np.logical_or.accumulate(mask, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis=axis), axis)
        filled &= before & after
    return filled


def _to_uint8(volume_XYZ: torch.Tensor, low: float, high: float) -> np.ndarray:
    there, back = _memory_order(volume_XYZ)
    grey = torch.empty([volume_XYZ.shape[axis] for axis in there], dtype=torch.uint8)
    for grey_plane, plane in zip(grey, volume_XYZ.permute(there), strict=True):  # a plane stays in the CPU's cache
        grey_plane.copy_((plane - float(low)).mul_(255 / (float(high) - float(low))).round_().clamp_(0, 255))
    return np.ascontiguousarray(grey.numpy().transpose(back))


def _regrid(affine: np.ndarray, step, first) -> np.ndarray:
    """The affine of a grid whose voxel 0 is source voxel `first` and whose voxels are `step` source voxels apart."""
    return affine @ np.array(
        [[step[0], 0, 0, first[0]], [0, step[1], 0, first[1]], [0, 0, step[2], first[2]], [0, 0, 0, 1]]
    )


def _spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
