"""Any brain image on disk as voxels: NIfTI-1/2, single or pair, Analyze, and a DICOM series' folder.

1. read the header's bytes, whatever they claim, and refuse what cannot be one brain volume or contradicts itself;
2. read the voxels, never more than the header promised;
3. scale them and turn them to RAS+ (a rotation stays in the affine).

A format is told by what a file holds, not by its name: `.nii` may be gzip inside and `.nii.gz` may be plain.
"""

import gzip
import hashlib
import io
import math
import os
import re
import stat
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import deflate
import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.spm2analyze import Spm2AnalyzeHeader

from medblip import dicom

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
MIN_VOXELS, MAX_VOXELS = 16, 2048  # along one axis
MIN_EDGE_MM, MAX_EDGE_MM = 40.0, 1000.0
MAX_SLICE_GAP_MM, FLAT = 5.0, 1.5  # slices this far apart, and this many times farther than pixels, are no volume
MAX_TOTAL_VOXELS = 2**28  # 1 GiB as float32; a 0.4 mm whole head has 2**27.6
SAME_SPACING = 0.01  # pixdim and sform may differ by this share
MAX_SLOPE = 1e20
DEFLATE_RATIO = 1032  # the most that deflate can do
GZIP_MARK = b"\x1f\x8b"

# Axis codes of the Analyze 7.5 `orient` byte. The format has no other record of left and right.
ANALYZE_AXES = {0: "LAS", 1: "LSA", 2: "ASL", 3: "LPS", 4: "LIA", 5: "AIL"}

# Releases whose headers say nothing, or the wrong thing, about the axes; known by folder and file name.
RELEASE_AXES = {
    r"OAS1_\d{4}_MR\d+_mpr-\d+_anon\.": "ASL",  # OASIS-1 RAW
    r"_sbj_111\.": "ASL",  # OASIS-1 SUBJ_111
    r"_t88_(masked_)?gfc": "LAS",  # OASIS-1 T88_111 and FSL_SEG
    r"OAS2_\d{4}_MR\d+/RAW/mpr-\d+\.nifti\.": "ASL",  # OASIS-2
}


@dataclass(frozen=True)
class _Stored:
    """What a header says of its voxels."""

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    slope: float
    inter: float
    file: Path
    offset: int


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one volume as float32 X, Y, Z (RAS+, in any memory layout) with its 4x4 affine, voxel to world mm.

    The header is judged before voxels are read. Intensities are scaled by the header's slope and intercept; NaN
    and infinities become the smallest finite value. A gzip checksum is verified.

    Args:
        path: an image file, or a folder that holds one DICOM series.

    Raises:
        ValueError: it cannot be read as one volume; the message names the path and the reason.
    """
    try:
        return _read_folder(Path(path)) if _is_folder(Path(path)) else _read_file(Path(path))
    # nibabel, pydicom, gzip and numpy have dozens of exception types for a damaged file; for the caller they are one.
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip: {error}") from error
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"cannot be read ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {reason}") from error


def image_sha256(path: str | Path) -> str:
    """sha256 of the file that holds the voxels; of a DICOM folder, of its files' sorted sha256, whatever their names.

    Raises:
        ValueError: there is no such file; the message names the path and the reason.
    """
    try:
        if not _is_folder(Path(path)):
            return _sha256(voxel_file(path))
        files = sorted(map(_sha256, dicom.files_of(Path(path))))
        return hashlib.sha256("".join(files).encode()).hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def voxel_file(path: str | Path) -> Path:
    """The file that holds the voxels: the `.img` of a pair, else the image file itself."""
    return _partner(Path(path), "img")


def turn_to_ras(array_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 with axes flipped and ordered to the closest RAS+, finite; memory keeps the order of `array_XYZ`.

    Raises:
        ValueError: every voxel is the same.
    """
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, array_XYZ.shape)
    is_float = array_XYZ.dtype.kind == "f"
    with np.errstate(over="ignore", invalid="ignore"):
        array_XYZ = nib.apply_orientation(array_XYZ, orientation).astype(np.float32, order="K")
    if is_float and not math.isfinite(array_XYZ.sum(dtype=np.float64)):
        finite = np.isfinite(array_XYZ)
        if not finite.any():
            raise ValueError("constant image: no voxel is finite")
        array_XYZ[~finite] = array_XYZ[finite].min()
    middle = array_XYZ[array_XYZ.shape[0] // 2]  # looked at first: a whole pass is only for the rare flat one
    if np.ptp(middle) == 0 and np.ptp(array_XYZ) == 0:
        raise ValueError(f"constant image: every voxel is {array_XYZ[0, 0, 0]:g}")
    return array_XYZ, affine


def check_grid(shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Raises ValueError unless a head scan can have this shape and this affine (voxel to mm)."""
    if len(shape) != 3:
        raise ValueError(f"shape {tuple(shape)} is not one 3-D volume; extract one frame first")
    if min(shape) < MIN_VOXELS or max(shape) > MAX_VOXELS or math.prod(shape) > MAX_TOTAL_VOXELS:
        limits = f"{MIN_VOXELS}..{MAX_VOXELS} voxels a side and {MAX_TOTAL_VOXELS} in all"
        raise ValueError(f"shape {tuple(shape)} is not within {limits}")
    with np.errstate(over="ignore", invalid="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not np.isfinite(spacing).all() or not (spacing > 0).all():
        raise ValueError(f"the affine has no finite voxel size: {affine.tolist()}")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise ValueError(f"the affine is singular: {affine.tolist()}")
    edges_mm = spacing * shape
    if edges_mm.min() < MIN_EDGE_MM or edges_mm.max() > MAX_EDGE_MM:
        raise ValueError(
            f"covers {_by(edges_mm)} mm, not {MIN_EDGE_MM:g}..{MAX_EDGE_MM:g} mm a side; is the voxel size right?"
        )
    if spacing.max() >= MAX_SLICE_GAP_MM and spacing.max() >= FLAT * spacing.min():
        raise ValueError(
            f"slice gap of {spacing.max():.4g} mm (voxels of {_by(spacing)} mm): from {MAX_SLICE_GAP_MM:g} mm on this "
            "is no volume acquisition"
        )


def check_dtype(dtype: np.dtype) -> None:
    """Raises ValueError unless voxels of this type are one real number each."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"voxel type {dtype} is not a real number of at most 64 bits per voxel")


def _by(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def _is_folder(path: Path) -> bool:
    """Tells folder from file without opening either: opening a pipe would wait for its writer.

    Raises:
        ValueError: it is neither.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"{error.strerror}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise ValueError("neither a file nor a folder, but a device or a pipe")
    return stat.S_ISDIR(mode)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    series = dicom.read_headers(folder)
    if series.needs_converter:
        with tempfile.TemporaryDirectory() as scratch:
            return _read_file(dicom.convert(folder, Path(scratch), series.needs_converter))
    affine = dicom.affine_of(series)
    check_grid(series.shape, affine)
    return turn_to_ras(dicom.read_voxels(series), affine)


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix.lower() in (".dcm", ".ima"):
        raise ValueError("one DICOM file is one slice; give the folder that holds the series")
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"not an image this reads; expected a name ending in {', '.join(SUFFIXES)}, or a DICOM folder")
    stored = _read_header(path)
    check_grid(stored.shape, stored.affine)
    check_dtype(stored.dtype)
    size = math.prod(stored.shape) * stored.dtype.itemsize
    # Tools pad files, by less than a plane; more means that the header's shape is not the file's.
    padding = stored.dtype.itemsize * math.prod(stored.shape) // max(stored.shape) - 1
    data = _voxel_bytes(stored.file, stored.offset, size, padding)
    array_XYZ = np.frombuffer(data, dtype=stored.dtype).reshape(stored.shape, order="F")
    if (stored.slope, stored.inter) != (1, 0):
        array_XYZ = array_XYZ.astype(np.float32) * np.float32(stored.slope) + np.float32(stored.inter)
    return turn_to_ras(array_XYZ, stored.affine)


def _partner(path: Path, role: str) -> Path:
    """The header ("hdr") or voxel ("img") file that belongs to `path`, packed as it is if there are both."""
    pair = re.fullmatch(r"(.+)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE)
    if not pair:
        return path
    stem, own_role, packed = pair[1], pair[2], pair[3] or ""
    if own_role.lower() == role:
        return path
    names = [f"{stem}.{role}{packed}", f"{stem}.{role}" + ("" if packed else ".gz"), f"{stem}.{role.upper()}"]
    for name in names:
        if path.with_name(name).is_file():
            return path.with_name(name)
    kind = {"hdr": "header", "img": "voxel file"}[role]
    raise ValueError(f"a pair whose {kind} {names[0]} is missing")


def _read_header(path: Path) -> _Stored:
    file = _partner(path, "hdr")
    voxels = _partner(path, "img")
    head = _first_bytes(file, nib.Nifti2Header.sizeof_hdr)
    header = _parse(head, file)
    with np.errstate(invalid="ignore"):
        pixdim = np.abs(header["pixdim"].astype(np.float64))
    header["pixdim"][1:] = pixdim[1:]
    shape = _shape(header)
    dtype = _voxel_type(header)
    affine = _nifti_affine(header, shape, path) if isinstance(header, nib.Nifti1Header) else None
    if affine is None:
        affine = _analyze_affine(header, shape, path)
    slope, inter = _scaling(header)
    return _Stored(shape, dtype, affine, slope, inter, voxels, _offset(header, is_single=file == voxels))


def _first_bytes(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        if file.peek(2)[:2] == GZIP_MARK:
            with gzip.GzipFile(fileobj=file) as stream:
                return stream.read(size)
        return file.read(size)


def _parse(head: bytes, file: Path) -> AnalyzeHeader:
    """The header as nibabel's, of the class that its size and magic bytes ask for; nothing is checked or mended."""
    if not head:
        raise ValueError("empty file")
    sizes = {order: int.from_bytes(head[:4], name) for order, name in (("<", "little"), (">", "big"))}
    order = next((order for order in sizes if sizes[order] in (348, 540)), None)
    if order is None:
        raise ValueError(f"neither NIfTI nor Analyze: it begins with {head[:8]!r}")
    if len(head) < sizes[order]:
        raise ValueError(f"truncated: {len(head)} of {sizes[order]} header bytes are there")
    is_single = not re.search(r"\.hdr(\.gz)?$", file.name, re.IGNORECASE)
    if sizes[order] == 540:
        kind, magic, expected = nib.Nifti2Header, head[4:12], b"n+2\0\r\n\x1a\n" if is_single else b"ni2\0\r\n\x1a\n"
    else:
        kind, magic, expected = nib.Nifti1Header, head[344:348], b"n+1\0" if is_single else b"ni1\0"
    if magic != expected:
        # A pair without any NIfTI mark is Analyze; one with half a mark is a damaged NIfTI, whose axes would be lost.
        marks = sum(found == mark for found, mark in zip(magic[:3], b"ni1", strict=True))
        if is_single or kind is nib.Nifti2Header or marks >= 2:
            raise ValueError(f"damaged header: its magic bytes are {magic!r}, not {expected!r}")
        kind = Spm2AnalyzeHeader
    return kind(head[: sizes[order]], endianness=order, check=False)


def _shape(header: AnalyzeHeader) -> tuple[int, ...]:
    dim = header["dim"].tolist()
    if not 1 <= dim[0] <= 7:
        raise ValueError(f"damaged header: dim[0], the number of axes, is {dim[0]}")
    shape = dim[1 : dim[0] + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _voxel_type(header: AnalyzeHeader) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        dtype = np.dtype("V0")  # as nibabel says of the types it knows and cannot read
    bits = dtype.itemsize * 8
    if bits == 0:
        raise ValueError(f"voxel type with datatype {header['datatype']} is not a real number of at most 64 bits")
    if header["bitpix"] != bits:
        raise ValueError(f"damaged header: datatype is {dtype}, of {bits} bits, and bitpix is {header['bitpix']}")
    return dtype


def _nifti_affine(header: nib.Nifti1Header, shape: tuple[int, ...], path: Path) -> np.ndarray | None:
    """The sform if it has a code, else the qform; None if neither has one and `path` is of a release known by name."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, 2):
        name = {1: "metres", 3: "microns"}.get(unit, f"unknown code {unit}")
        raise ValueError(f"the unit of length is {name}, not millimetres (xyzt_units {int(header['xyzt_units'])})")
    qform_code, sform_code = int(header["qform_code"]), int(header["sform_code"])
    if not (0 <= qform_code <= 5 and 0 <= sform_code <= 5):
        raise ValueError(f"damaged header: qform_code is {qform_code} and sform_code {sform_code}, not 0..5")
    if sform_code > 0:
        affine = header.get_sform().astype(np.float64)
        pixdim = header["pixdim"][1:4].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            differs = (pixdim != 0) & ~(np.abs(spacing - pixdim) <= SAME_SPACING * pixdim)
        if np.isfinite(spacing).all() and (spacing > 0).all() and differs.any():
            raise ValueError(f"voxel size is {_by(pixdim)} mm in pixdim and {_by(spacing)} mm in the sform; mend one")
        return affine
    if qform_code > 0:
        if header["pixdim"][0] not in (-1, 1):
            if header["pixdim"][0] != 0:
                raise ValueError(f"damaged header: pixdim[0] is {header['pixdim'][0]:g}, not 1 or -1")
            header["pixdim"][0] = 1
        try:
            return header.get_qform().astype(np.float64)
        except (ValueError, HeaderDataError) as error:
            raise ValueError(f"damaged header: its qform is no rotation ({error})") from error
    if _release_axes(path) is None:
        raise ValueError(
            "qform_code and sform_code are both 0: nothing says which way its axes lie, nor which side is left; "
            "set them from the scan it was made of, with fslcpgeom or nibabel's set_sform"
        )
    return None


def _release_axes(path: Path) -> str | None:
    name = "/".join(path.absolute().parts[-3:])
    return next((axes for pattern, axes in RELEASE_AXES.items() if re.search(pattern, name)), None)


def _analyze_affine(header: AnalyzeHeader, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """From the voxel size and, for the axes, the release, else SPM's .mat file, else the `orient` byte."""
    if len(shape) != 3:
        return np.eye(4)  # refused next, by its shape
    axes = _release_axes(path)
    if axes is None:
        file = _partner(path, "hdr")
        if file.with_suffix(".mat").is_file():
            return np.asarray(nib.Spm2AnalyzeImage.load(file).affine, dtype=np.float64)
        orient = int.from_bytes(bytes(header["orient"]) or b"\0")
        if orient not in ANALYZE_AXES:
            raise ValueError(f"Analyze orient code {orient} is none of {list(ANALYZE_AXES)}; convert to NIfTI")
        axes = ANALYZE_AXES[orient]
    to_ras = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axes), shape)
    return np.linalg.inv(to_ras) @ np.diag([*header["pixdim"][1:4].astype(np.float64), 1.0])


def _scaling(header: AnalyzeHeader) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where the header has none, which a slope of 0 or NaN says."""
    if not isinstance(header, nib.Nifti1Header):
        slope, inter = header.get_slope_inter()
        return (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (1 / MAX_SLOPE < slope < MAX_SLOPE and abs(inter) < MAX_SLOPE):
        raise ValueError(f"intensities cannot be scaled by scl_slope {slope:g} and scl_inter {inter:g}")
    return slope, inter


def _offset(header: AnalyzeHeader, is_single: bool) -> int:
    offset = float(header["vox_offset"])
    first = len(header.binaryblock) + 4 if is_single else 0
    if is_single and offset == 0:  # some tools leave it out
        return first
    if not (offset >= first and offset.is_integer()):
        raise ValueError(f"damaged header: voxels begin at byte {offset:g} (vox_offset), expected {first} or later")
    return int(offset)


def _voxel_bytes(path: Path, first: int, size: int, padding: int) -> bytes:
    """`size` bytes from byte `first` on of a plain or gzip file; packed ones are read to the end and checked."""
    with open(path, "rb") as file:
        size_on_disk = os.path.getsize(path)
        if file.peek(2)[:2] == GZIP_MARK:
            # What cannot hold the voxels, or must hold more, is not worth its memory.
            if size_on_disk * DEFLATE_RATIO < size:
                raise ValueError(f"truncated: {size_on_disk} packed bytes cannot hold {size} voxel bytes")
            if size_on_disk > 1.01 * (first + size) + 2**20:
                raise ValueError(f"{size_on_disk} packed bytes are more than the header's shape takes unpacked")
            data = _gunzip(file.read(), first + size, padding)
            available, data = len(data) - first, memoryview(data)[first : first + size]
        else:
            available = size_on_disk - first
            if size <= available <= size + padding:
                file.seek(first)
                data = file.read(size)
    if available < size:
        raise ValueError(f"truncated: {max(available, 0)} of {size} voxel bytes are there")
    if available > size + padding:
        raise ValueError(f"{available} voxel bytes are there, {size} by the header's shape: one of them is wrong")
    return data


def _gunzip(packed: bytes, needed: int, padding: int) -> bytes:
    """Unpacks a gzip file and verifies its checksum; stops soon after `needed + padding` bytes."""
    claimed = int.from_bytes(packed[-4:], "little")  # the unpacked size, if the file is one member
    if needed <= claimed <= needed + padding:
        try:
            data = deflate.gzip_decompress(packed)
            if len(data) == claimed:
                return data
        except deflate.DeflateError:
            pass  # several members, or damaged: gzip reads the one and says what is wrong with the other
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        return stream.read(needed + padding + 1)
