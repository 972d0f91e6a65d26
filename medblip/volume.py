"""A brain image becomes the uint8 volume that the model reads: one function, in training and in inference.

1. read the header and refuse what cannot be one brain volume, before any memory is taken;
2. read the voxels (NIfTI-1/2, NIfTI pair, Analyze), scaled, as float32, turned to RAS+;
3. lay a cube grid over it (`standard`: in millimetres, around the head; `reference`: by voxel count);
4. map intensities to 0..255 and keep only the part of the grid that the image covers.

Arrays are X, Y, Z with x growing to the subject's Right, y to the Anterior, z to the Superior, end to end.
A rotation stays in the affine: voxels are resampled along their own axes, never turned.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import deflate
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".img.gz")
MIN_VOXELS, MAX_VOXELS = 16, 2048  # along one axis
MIN_EDGE_MM, MAX_EDGE_MM = 40.0, 1000.0
MAX_TOTAL_VOXELS = 2**29  # 2 GiB as float32, twice what a 0.4 mm whole head takes

# Axis codes of the Analyze 7.5 `orient` byte. The format has no other record of left and right, so this is all
# there is to go by: OASIS-1 and OASIS-2 raw scans are sagittal (2).
ANALYZE_AXES = {0: "LAS", 1: "LSA", 2: "ASL", 3: "LPS", 4: "LIA", 5: "AIL"}

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


def prepare(path: str | Path, recipe: Recipe) -> Prepared:
    """Reads an image file and prepares it: the way of every scan, into a shard or into an answer.

    Raises:
        ValueError: the file is not one readable brain volume; the message names the file and the reason.
    """
    array_XYZ, affine = read_image(path)
    try:
        return _prepare_ras(array_XYZ, affine, recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def prepare_array(array_XYZ: np.ndarray, affine: np.ndarray, recipe: Recipe) -> Prepared:
    """Prepares voxels that are already in memory, with any axis order, given by `affine` (voxel to RAS+ mm).

    Raises:
        ValueError: as `prepare`, without a file to name.
    """
    affine = np.asarray(affine, dtype=np.float64)
    _check_grid(array_XYZ.shape, affine)
    _check_dtype(array_XYZ.dtype)
    return _prepare_ras(*_to_ras(array_XYZ, affine), recipe)


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one volume as float32 X, Y, Z (RAS+, C-contiguous) with its 4x4 affine, voxel to world mm.

    The header is judged before voxels are read. Intensities are scaled by the header's slope and intercept; NaN
    and infinities become the smallest finite value. A gzip checksum is verified.

    Raises:
        ValueError: the file cannot be read as one volume; the message names the file and the reason.
    """
    try:
        return _read(Path(path))
    # nibabel, gzip and numpy have a dozen exception types for a damaged file; for the caller they are one thing.
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {reason}") from error


def voxel_file(path: str | Path) -> Path:
    """The file that holds the voxels: the `.img` of a pair, else the image file itself."""
    path = Path(path)
    if path.suffix != ".hdr":
        return path
    packed = path.with_suffix(".img.gz")
    return packed if packed.exists() else path.with_suffix(".img")


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
    low, high = volume_XYZ.aminmax()
    scaled_XYZ = (volume_XYZ - low) / (high - low)
    resized_XYZ = F.interpolate(scaled_XYZ[None, None], new_shape, mode="trilinear", align_corners=True)[0, 0]
    return resized_XYZ, tuple((size - n) // 2 for n in new_shape)


def _check_grid(shape: tuple[int, ...], affine: np.ndarray) -> None:
    if len(shape) != 3:
        raise ValueError(f"shape {tuple(shape)} is not one 3-D volume; extract one frame first")
    if min(shape) < MIN_VOXELS or max(shape) > MAX_VOXELS or math.prod(shape) > MAX_TOTAL_VOXELS:
        limits = f"{MIN_VOXELS}..{MAX_VOXELS} voxels a side and {MAX_TOTAL_VOXELS} in all"
        raise ValueError(f"shape {tuple(shape)} is not within {limits}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise ValueError(f"the affine has no finite voxel size: {affine.tolist()}")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise ValueError(f"the affine is singular: {affine.tolist()}")
    edges_mm = spacing * shape
    if edges_mm.min() < MIN_EDGE_MM or edges_mm.max() > MAX_EDGE_MM:
        edges = " x ".join(f"{edge:g}" for edge in edges_mm)
        raise ValueError(f"covers {edges} mm, not {MIN_EDGE_MM:g}..{MAX_EDGE_MM:g} mm a side; is the voxel size right?")


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "biuf":
        raise ValueError(f"voxel type {dtype} is not a real number per voxel")


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"not an image this reads; expected a name ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError("no such file")
    image = nib.load(path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    affine = _affine_of(image, shape)
    _check_grid(shape, affine)
    stored = image.dataobj
    _check_dtype(stored.dtype)

    data = _voxel_bytes(image.file_map["image"].filename, stored.offset, math.prod(shape) * stored.dtype.itemsize)
    array_XYZ = np.frombuffer(data, dtype=stored.dtype).reshape(shape, order="F")
    if (stored.slope, stored.inter) != (1, 0):
        array_XYZ = array_XYZ.astype(np.float32) * np.float32(stored.slope) + np.float32(stored.inter)
    return _to_ras(array_XYZ, affine)


def _affine_of(image: nib.AnalyzeImage, shape: tuple[int, ...]) -> np.ndarray:
    """The header's affine; for Analyze, which has none, from its voxel sizes and its `orient` byte."""
    is_nifti = isinstance(image, nib.Nifti1Pair)
    has_mat = "mat" in image.file_map and os.path.exists(image.file_map["mat"].filename)
    if is_nifti or has_mat:
        return np.asarray(image.affine, dtype=np.float64)
    orient = int.from_bytes(bytes(image.header["orient"]) or b"\0")
    if orient not in ANALYZE_AXES:
        raise ValueError(f"Analyze orient code {orient} is none of {list(ANALYZE_AXES)}; convert to NIfTI")
    if len(shape) != 3:
        return np.eye(4)  # refused next, by its shape
    to_ras = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(ANALYZE_AXES[orient]), shape)
    return np.linalg.inv(to_ras) @ np.diag([*image.header.get_zooms()[:3], 1.0])


def _voxel_bytes(path: str, first: int, size: int) -> bytes:
    """`size` bytes from byte `first` on of a plain or gzip file; packed ones are read to the end and checked."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        available = os.path.getsize(path) - first
        if packed:
            file.seek(0)
            data = _gunzip(file.read(), first + size)[first : first + size]
            available = len(data)
        elif available >= size:
            file.seek(first)
            data = file.read(size)
    if available < size:
        raise ValueError(f"truncated: {max(available, 0)} of {size} voxel bytes are there")
    return data


def _gunzip(packed: bytes, needed: int) -> bytes:
    """Unpacks a gzip file, at least its first `needed` bytes, and verifies its checksum."""
    claimed = int.from_bytes(packed[-4:], "little")  # the unpacked size, if the file is one member
    if needed <= claimed <= needed + 2**20:
        try:
            data = deflate.gzip_decompress(packed)
            if len(data) == claimed:
                return data
        except deflate.DeflateError:
            pass  # several members, or damaged: gzip reads the one and says what is wrong with the other
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        data = stream.read(needed)
        while stream.read(2**20):  # the checksum comes last
            pass
    return data


def _to_ras(array_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 with axes flipped and ordered to the closest RAS+, finite, contiguous."""
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, array_XYZ.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        array_XYZ = np.ascontiguousarray(nib.apply_orientation(array_XYZ, orientation), dtype=np.float32)
    finite = np.isfinite(array_XYZ)
    if not finite.any():
        raise ValueError("constant image: no voxel is finite")
    if not finite.all():
        array_XYZ = np.where(finite, array_XYZ, array_XYZ[finite].min())
    if array_XYZ.min() == array_XYZ.max():
        raise ValueError(f"constant image: every voxel is {array_XYZ.flat[0]:g}")
    return array_XYZ, affine


def _prepare_ras(array_XYZ: np.ndarray, affine: np.ndarray, recipe: Recipe) -> Prepared:
    volume_XYZ = torch.from_numpy(array_XYZ)
    if recipe.name == "standard":
        return _standard(volume_XYZ, affine, recipe)
    return _reference(volume_XYZ, affine, recipe)


def _reference(volume_XYZ: torch.Tensor, affine: np.ndarray, recipe: Recipe) -> Prepared:
    resized_XYZ, pad_before = reference_resize(volume_XYZ, recipe.size)
    low, high = volume_XYZ.aminmax()
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


def _standard(volume_XYZ: torch.Tensor, affine: np.ndarray, recipe: Recipe) -> Prepared:
    source_shape = tuple(volume_XYZ.shape)
    volume_XYZ, affine = _average_blocks(volume_XYZ, affine, recipe)
    spacing_mm = _spacing_mm(affine)
    head = _find_head(volume_XYZ, spacing_mm, recipe.head_height_mm)

    # Where grid voxel 0 should lie, in source voxels: centred on the head, hung from above its top.
    step = [recipe.spacing_mm / spacing for spacing in spacing_mm]
    first = [(low + high - 1) / 2 - s * (recipe.size - 1) / 2 for (low, high), s in zip(head.box, step, strict=True)]
    top = head.box[2][1] - 0.5 + recipe.margin_above_vertex_mm / spacing_mm[2]
    first[2] = top - step[2] * (recipe.size - 0.5)
    axes = [_lay_axis(n, f, s, recipe.size) for n, f, s in zip(volume_XYZ.shape, first, step, strict=True)]
    if min(len(axis.positions) for axis in axes) == 0:
        raise ValueError(f"no voxel of the {recipe.size}-voxel grid falls into the image; is the voxel size right?")
    volume_XYZ = _sample(volume_XYZ, axes, step)

    stride = max(1, round(INTENSITY_SAMPLE_MM / recipe.spacing_mm))
    blocks = [
        np.rint(axis.positions[::stride]).astype(int) // block for axis, block in zip(axes, head.block, strict=True)
    ]
    intensities = volume_XYZ[::stride, ::stride, ::stride].numpy()[head.mask[np.ix_(*blocks)]]
    if len(intensities) == 0:
        raise ValueError(f"the {recipe.size}-voxel grid misses the head; take a larger size or spacing_mm")
    low, high = np.percentile(intensities, [recipe.low_percentile, recipe.high_percentile])
    if low == high:
        raise ValueError(f"constant image: nearly all of the head is {low:g}")

    affine = _regrid(affine, step, [axis.positions[0] for axis in axes])
    return Prepared(
        volume_XYZ=_to_uint8(volume_XYZ, low, high),
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
    return F.avg_pool3d(volume_XYZ[None, None], block)[0, 0], _regrid(affine, block, [(b - 1) / 2 for b in block])


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
    new_shape = [axis.skip + len(axis.positions) for axis in axes]
    sampled = torch.ops.aten.upsample_trilinear3d(volume_XYZ[None, None], new_shape, False, *(1 / s for s in step))
    return sampled[0, 0][tuple(slice(axis.skip, None) for axis in axes)]


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
    coarse_XYZ = F.avg_pool3d(volume_XYZ[None, None], block, ceil_mode=True)[0, 0].numpy()
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
    low, high = coarse_XYZ.min(), np.percentile(coarse_XYZ, 99.9)
    counts, edges = np.histogram(np.minimum(coarse_XYZ, high), bins=256, range=(low, max(high, low + 1e-6)))
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
    scaled_XYZ = (volume_XYZ - float(low)).mul_(255 / (float(high) - float(low)))
    return scaled_XYZ.round_().clamp_(0, 255).to(torch.uint8).contiguous().numpy()


def _regrid(affine: np.ndarray, step, first) -> np.ndarray:
    """The affine of a grid whose voxel 0 is source voxel `first` and whose voxels are `step` source voxels apart."""
    return affine @ np.array(
        [[step[0], 0, 0, first[0]], [0, step[1], 0, first[1]], [0, 0, step[2], first[2]], [0, 0, 0, 1]]
    )


def _spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
