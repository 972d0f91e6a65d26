"""A folder of DICOM files as one volume, if it holds one series of plain slices.

1. read the headers of all files that carry the DICOM mark; the rest of the folder is ignored;
2. refuse what is not one stack: several series, a localizer, a missing, doubled or shifted slice;
3. order the slices by position along their normal, never by file name or instance number;
4. read the voxels, scaled slice by slice.

Compressed, enhanced (multi-frame) and mosaic files go through dcm2niix, if it is there.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
MAX_FILES = 20_000
MAX_HEADER_BYTES = 2**26
SAME_GAP = 0.02  # slices are evenly spaced if every gap is within this share of the usual one
SAME_DIRECTION = 1e-3  # between the unit vectors of two slices
SAME_SPACING = 1e-3  # share
CONVERTER_TIMEOUT_S = 300
HEADER_TAGS = [
    "ImageType", "SeriesInstanceUID", "SeriesDescription", "Rows", "Columns", "NumberOfFrames", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip
SAME_IN_ALL = {
    "size": ["Rows", "Columns"],
    "type": ["BitsAllocated", "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation"],
}


@dataclass(frozen=True)
class Series:
    """The headers of one series: along the normal if they are plain slices, as found if they need a converter."""

    files: list[Path]
    headers: list[pydicom.Dataset]
    needs_converter: str
    """Why only dcm2niix can read them; empty if we can."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices: the axes of `read_voxels` and `affine_of`."""
        return self.headers[0].Columns, self.headers[0].Rows, len(self.headers)


def files_of(folder: Path) -> list[Path]:
    """The folder's DICOM files, by name; those of its subfolders do not count.

    Raises:
        ValueError: there is none, or far too many.
    """
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_file() or entry.name == "DICOMDIR":
            continue
        with open(entry.path, "rb") as file:
            head = file.read(1024)
        if head[128:132] != b"DICM":
            continue
        if f"{DeflatedExplicitVRLittleEndian}".encode() in head:  # unpacked whole, however large, to read its header
            raise ValueError(f"{entry.name} is stored deflated; convert the series to NIfTI first")
        found.append(Path(entry.path))
        if len(found) > MAX_FILES:
            raise ValueError(f"holds more than {MAX_FILES} DICOM files; give the folder of one series")
    if not found:
        raise ValueError("a folder without DICOM files (subfolders are not searched); give a file or a series' folder")
    return found


def read_headers(folder: Path) -> Series:
    """Reads the headers, checks that they are one series and one stack, and orders them.

    Raises:
        ValueError: they are not one volume; the message says why.
    """
    files, headers = [], []
    for file in files_of(folder):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER_TAGS)
            is_image = bool(header.get("Rows") and header.get("Columns"))
        except Exception as error:  # pydicom has no type of its own for a damaged file
            raise ValueError(f"{file.name} cannot be read ({type(error).__name__}: {error})") from error
        if is_image:
            files.append(file)
            headers.append(header)
    if not headers:
        raise ValueError("no image among its DICOM files")
    _check_one_series(headers)
    _check_grey(files, headers)
    needs_converter = _needs_converter(headers)
    if needs_converter:
        return Series(files, headers, needs_converter)
    order = _check_stack(files, headers)
    return Series([files[n] for n in order], [headers[n] for n in order], "")


def affine_of(series: Series) -> np.ndarray:
    """Voxel (column, row, slice) to RAS+ mm; the distance of slices is that of their positions."""
    positions = [_numbers(header, "ImagePositionPatient", 3) for header in series.headers]
    along_columns, along_rows = _numbers(series.headers[0], "ImageOrientationPatient", 6).reshape(2, 3)
    between_rows_mm, between_columns_mm = _numbers(series.headers[0], "PixelSpacing", 2)
    affine = np.eye(4)
    affine[:3, 0] = along_columns * between_columns_mm
    affine[:3, 1] = along_rows * between_rows_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts to the left and back, we to the right and front


def read_voxels(series: Series) -> np.ndarray:
    """Column, row, slice; float32 with the slices' slopes and intercepts, or as stored if they have none.

    Raises:
        ValueError: a file has not the voxels that its header promises.
    """
    scales = [(float(h.get("RescaleSlope", 1) or 1), float(h.get("RescaleIntercept", 0) or 0)) for h in series.headers]
    columns, rows, slices = series.shape
    sign = "i" if series.headers[0].PixelRepresentation else "u"
    stored = np.dtype(f"{sign}{series.headers[0].BitsAllocated // 8}")
    is_scaled = set(scales) != {(1.0, 0.0)}
    array_ZYX = np.empty((slices, rows, columns), np.float32 if is_scaled else stored)
    for slice_YX, file, (slope, inter) in zip(array_ZYX, series.files, scales, strict=True):
        try:
            if os.path.getsize(file) > rows * columns * stored.itemsize + MAX_HEADER_BYTES:
                raise ValueError("far larger than its one slice")
            pixels_YX = pydicom.dcmread(file).pixel_array
        except Exception as error:
            raise ValueError(f"{file.name} cannot be read ({type(error).__name__}: {error})") from error
        slice_YX[:] = pixels_YX * np.float32(slope) + np.float32(inter) if is_scaled else pixels_YX
    return array_ZYX.transpose()


def convert(folder: Path, scratch: Path, why: str) -> Path:
    """Converts the folder's series with dcm2niix into `scratch` and returns the one NIfTI file that comes out.

    Raises:
        ValueError: dcm2niix is not there, fails, or makes none or several files.
    """
    beside_python = Path(sys.executable).with_name("dcm2niix")
    program = shutil.which("dcm2niix") or (str(beside_python) if beside_python.exists() else None)
    if program is None:
        raise ValueError(f'{why}; only dcm2niix reads that: pip install "medblip[dicom]"')
    # Plain numbers as stored (-p n), nothing but this folder (-d 0), no defaults of this user's (-g i).
    options = ["-g", "i", "-b", "n", "-z", "n", "-p", "n", "-d", "0", "-f", "image", "-o", str(scratch)]
    try:
        done = subprocess.run(
            [program, *options, str(folder.absolute())], capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=CONVERTER_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"{why}; dcm2niix did not end within {CONVERTER_TIMEOUT_S} s") from None
    made = sorted(file.name for file in scratch.iterdir() if file.name.endswith((".nii", ".nii.gz")))
    if len(made) != 1:
        said = " ".join(done.stdout.split())[-300:]
        raise ValueError(f"{why}; dcm2niix made {len(made)} images of it, not one {made}: {said}")
    return scratch / made[0]


def _check_one_series(headers: list[pydicom.Dataset]) -> None:
    uids = [str(header.get("SeriesInstanceUID", "")) for header in headers]
    if len(set(uids)) > 1:
        names = {uid: header.get("SeriesDescription", "") for uid, header in zip(uids, headers, strict=True)}
        found = ", ".join(f"'{name}' with {uids.count(uid)} images" for uid, name in list(names.items())[:8])
        raise ValueError(f"holds {len(names)} series ({found}); give each its own folder")


def _check_grey(files: list[Path], headers: list[pydicom.Dataset]) -> None:
    for file, header in zip(files, headers, strict=True):
        colours = header.get("PhotometricInterpretation", "MONOCHROME2")
        if header.get("SamplesPerPixel", 1) != 1 or not str(colours).startswith("MONOCHROME"):
            raise ValueError(f"{file.name} is a colour image ({colours})")
        if colours == "MONOCHROME1":
            raise ValueError(f"{file.name} is stored inverted (MONOCHROME1); convert the series to NIfTI first")


def _needs_converter(headers: list[pydicom.Dataset]) -> str:
    for header in headers:
        syntax = header.file_meta.get("TransferSyntaxUID", "") if hasattr(header, "file_meta") else ""
        if int(header.get("NumberOfFrames", 1) or 1) > 1:
            return f"holds {header.NumberOfFrames} frames in one file (enhanced DICOM)"
        if "MOSAIC" in (header.get("ImageType") or []):
            return "its slices are tiled into one picture (mosaic)"
        if syntax not in UNCOMPRESSED:
            return f"its voxels are compressed ({getattr(syntax, 'name', syntax) or 'unknown transfer syntax'})"
    return ""


def _check_stack(files: list[Path], headers: list[pydicom.Dataset]) -> list[int]:
    """Checks that the slices are one even, straight stack; returns their order along the normal."""
    first = headers[0]
    if first.get("BitsAllocated") not in (8, 16) or first.get("PixelRepresentation") not in (0, 1):
        raise ValueError(f"{files[0].name} has {first.get('BitsAllocated')} bits per voxel, not 8 or 16")
    for what, tags in SAME_IN_ALL.items():
        found = {tuple(str(header.get(tag)) for tag in tags) for header in headers}
        if len(found) > 1:
            raise ValueError(f"slices differ in {what}: {' and '.join('x'.join(one) for one in sorted(found)[:4])}")

    tags = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3}
    geometry = {tag: np.array([_numbers(header, tag, n) for header in headers]) for tag, n in tags.items()}
    orientations = _distinct(geometry["ImageOrientationPatient"], SAME_DIRECTION)
    if len(orientations) > 1:
        several = "8 or more" if len(orientations) == 8 else len(orientations)
        raise ValueError(f"slices lie in {several} orientations: a localizer, or several stacks")
    spacings = _distinct(geometry["PixelSpacing"], SAME_SPACING * np.abs(geometry["PixelSpacing"][0]).min())
    if len(spacings) > 1:
        found = " and ".join(f"{rows:g} x {columns:g} mm" for rows, columns in spacings[:4])
        raise ValueError(f"slices differ in pixel spacing: {found}")
    along_columns, along_rows = orientations[0].reshape(2, 3)
    lengths = np.array([np.linalg.norm(along_columns), np.linalg.norm(along_rows)])
    if np.abs(lengths - 1).max() > 0.01 or abs(along_columns @ along_rows) > 0.01:
        raise ValueError(f"ImageOrientationPatient {orientations[0].tolist()} is not two unit vectors at a right angle")
    return _order(files, geometry["ImagePositionPatient"], np.cross(along_columns, along_rows))


def _order(files: list[Path], positions: np.ndarray, normal: np.ndarray) -> list[int]:
    if len(files) < 2:
        raise ValueError("holds one slice; give the folder of a whole series")
    heights_mm = positions @ normal
    order = np.argsort(heights_mm, kind="stable")
    gaps_mm = np.diff(heights_mm[order])
    usual_mm = float(np.median(gaps_mm))
    doubled = int(np.argmin(gaps_mm))
    if gaps_mm[doubled] < 1e-3 or gaps_mm[doubled] < SAME_GAP * usual_mm:
        one, other = files[order[doubled]].name, files[order[doubled + 1]].name
        raise ValueError(f"{one} and {other} lie at one position: several echoes, repeats or copies in one folder")
    odd = int(np.argmax(np.abs(gaps_mm - usual_mm)))
    if abs(gaps_mm[odd] - usual_mm) > SAME_GAP * usual_mm:
        missing = round(gaps_mm[odd] / usual_mm) - 1
        whole = missing >= 1 and abs(gaps_mm[odd] / usual_mm - missing - 1) <= SAME_GAP * (missing + 1)
        what = f"{missing} slice{'s' * (missing > 1)} missing" if whole else "slices are not evenly spaced"
        one, other = files[order[odd]].name, files[order[odd + 1]].name
        raise ValueError(f"{what}: {gaps_mm[odd]:.4g} mm between {one} and {other}, {usual_mm:.4g} mm elsewhere")
    offsets_mm = positions - np.outer(heights_mm, normal)
    shifts_mm = np.linalg.norm(offsets_mm - np.median(offsets_mm, axis=0), axis=1)
    shifted = int(np.argmax(shifts_mm))
    if shifts_mm[shifted] > 0.1:
        raise ValueError(f"{files[shifted].name} is shifted sideways by {shifts_mm[shifted]:.3g} mm: a tilted gantry?")
    return order.tolist()


def _distinct(rows: np.ndarray, tolerance: float) -> list[np.ndarray]:
    """The rows that differ from each other; eight are enough to say that they do."""
    found: list[np.ndarray] = []
    for row in rows:
        if len(found) < 8 and not any(np.abs(row - other).max() <= tolerance for other in found):
            found.append(row)
    return found


def _numbers(header: pydicom.Dataset, tag: str, count: int) -> np.ndarray:
    values = header.get(tag)
    if values is None or not hasattr(values, "__len__") or len(values) != count:
        raise ValueError(f"an image without {tag}: a screenshot or a drawing, not a scan")
    numbers = np.array([float(value) for value in values])
    if not np.isfinite(numbers).all():
        raise ValueError(f"{tag} is {numbers.tolist()}")
    return numbers
