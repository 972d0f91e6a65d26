"""Images of NACC as downloaded: session folders and zips of the mixed protocol, and the tree of SCAN.

1. one walk finds session folders, session zips, the leaves of SCAN's tree, and images that are in none of these;
2. the files of a session become its series: a NIfTI file each, or a folder of DICOM files;
3. a series is taken for a T1-weighted head by its name, and by its voxels' size where a header gives it.
"""

import datetime
import gzip
import json
import os
import posixpath
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from sharding.cohorts import nacc_zips
from sharding.cohorts.nacc_tables import SUBJECT
from sharding.tables import walk

SESSION = re.compile(r"mri\d+(?:ni)?|NACC\d{6}_.+", re.IGNORECASE)  # NACCMRFI, without .zip
SCAN_LEAF = re.compile(
    r"(?:.*/)?(?P<subject>NACC\d{6})/(?:.*/)?(?P<series>[^/]+)/(?P<date>\d{4}-\d\d-\d\d)_\d\d_\d\d_\d\d[^/]*/(?P<id>[^/]+)"
)
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".ima")
NO_DICOM = (
    ".json", ".xml", ".txt", ".csv", ".tsv", ".pdf", ".html", ".bval", ".bvec", ".gif", ".png", ".jpg", ".jpeg", ".zip",
    ".md", ".log", ".mat", ".tar", ".gz", ".img", ".hdr", ".tmp", ".nii",
)  # fmt: skip
HEADER_BYTES = 2**16  # the tags we read come before the large private ones
LAST_TAG = 0x00280030  # PixelSpacing


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where images are: a session's folder or zip, a leaf of SCAN's tree, or a folder that is neither."""

    kind: str
    """session, scan or stray."""
    path: Path
    stem: str
    """The session's name, or the image id of SCAN's leaf."""
    subject_id: str = ""
    """As the place's name says; empty for mri<digits>."""
    date: datetime.date | None = None
    series: str = ""
    files: tuple[str, ...] = ()
    """Relative to the place; of a zip, none yet."""
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A NIfTI file, or the DICOM files of one folder."""

    name: str
    """Its place within the session, without a suffix; `.` for DICOM files that are in no folder."""
    files: tuple[str, ...]
    is_dicom: bool
    description: str = ""
    protocol: str = ""
    number: int = 10**6
    """SeriesNumber; large where it is not known."""
    field_strength_t: float | None = None
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    fault: str = ""
    """Why it is no single readable series."""


@dataclass(frozen=True, kw_only=True)
class T1Rule:
    """What counts as a T1-weighted scan of a whole head."""

    names: re.Pattern
    other_names: re.Pattern
    max_slice_mm: float
    min_cover_mm: float


# --- 1. the walk ---


def find_places(images: Path, unpacked: Path) -> Iterator[Place]:
    """Walks the folder once; `unpacked`, which an earlier run wrote, is left out."""
    unpacked = unpacked.absolute()
    for parent, folders, files in walk(images):
        folders[:] = sorted(name for name in folders if Path(parent, name).absolute() != unpacked)
        for name in [name for name in folders if _is_session(Path(parent, name))]:
            folders.remove(name)
            path = Path(parent, name)
            yield Place(
                kind="session", path=path, stem=name, subject_id=_subject(name), files=tuple(sorted(_files_below(path)))
            )
        files = sorted(name for name in files if not name.startswith("."))
        for name in [name for name in files if name.lower().endswith(".zip")]:
            yield _zip_place(Path(parent, name))
        yield from _leaf(Path(parent), Path(parent).relative_to(images), files)


def _is_session(folder: Path) -> bool:
    """True by the name, unless the folder holds zips or people: then it is one that somebody made for them."""
    if not SESSION.fullmatch(folder.name):
        return False
    return not any(name.lower().endswith(".zip") or SUBJECT.fullmatch(name) for name in os.listdir(folder))


def _files_below(folder: Path) -> Iterator[str]:
    for parent, _, names in walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")


def _zip_place(path: Path) -> Place:
    stem = path.stem
    if SESSION.fullmatch(stem):
        return Place(kind="session", path=path, stem=stem, subject_id=_subject(stem))
    return Place(kind="stray", path=path, stem=stem, fault="a zip whose name is not that of a session")


def _leaf(folder: Path, relative: Path, files: list[str]) -> Iterator[Place]:
    niftis = tuple(name for name in files if name.lower().endswith(NIFTI))
    place = SCAN_LEAF.fullmatch(folder.absolute().as_posix())
    named_dicom = tuple(name for name in files if name.lower().endswith(DICOM))
    dicoms = named_dicom or (tuple(name for name in files if _maybe_dicom(name)) if place else ())
    if not niftis and not dicoms:
        return
    if place is None:
        subject = SUBJECT.search(relative.as_posix())
        for name in (*niftis, *(("",) if dicoms else ())):
            path = folder / name
            yield Place(
                kind="stray", path=path, stem=(relative / name).as_posix(), subject_id=subject[0] if subject else "",
                fault="neither in a session's folder nor in SCAN's tree",
            )  # fmt: skip
        return
    try:
        date = datetime.date.fromisoformat(place["date"])
    except ValueError:
        date = None
    several = len(niftis) + bool(dicoms) > 1
    for name in (*niftis, *(("",) if dicoms else ())):
        yield Place(
            kind="scan", path=folder / name, stem=f"{place['id']}/{name}".rstrip("/") if several else place["id"],
            subject_id=place["subject"], date=date, series=place["series"], files=(name,) if name else dicoms,
        )  # fmt: skip


def _subject(stem: str) -> str:
    found = SUBJECT.match(stem.upper())
    return found[0] if found else ""


def _maybe_dicom(name: str) -> bool:
    """True of names without a suffix that says otherwise; files of a DICOM folder often have none."""
    base = posixpath.basename(name)
    return not base.lower().endswith(NO_DICOM) and not base.startswith(".") and base.upper() != "DICOMDIR"


# --- 2. series of a session ---


@contextmanager
def open_session(place: Place) -> Iterator[tuple[dict[str, str], Callable[[str, int], bytes]]]:
    """The session's files, by their place within it to the zip's member (or the file), and how to read their starts.

    Raises:
        ValueError: the zip is broken or unsafe.
    """
    if place.path.is_dir():
        inner = {_inner(name, place.stem): name for name in place.files}
        yield inner, lambda name, size: _first_bytes(place.path / inner[name], size)
        return
    with nacc_zips.open_zip(place.path) as archive:
        names = [member.filename for member in archive.infolist() if not member.is_dir()]
        inner = {_inner(name, place.stem): name for name in names}
        yield inner, lambda name, size: nacc_zips.first_bytes(archive, inner[name], size)


def _first_bytes(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def _inner(name: str, stem: str) -> str:
    """The name without the session's own folder, so that a zip and its unpacked folder say the same."""
    first, _, rest = name.partition("/")
    return rest if rest and first.lower() == stem.lower() else name


def series_of(files: dict[str, str], first_bytes: Callable[[str, int], bytes], rule: T1Rule) -> Iterator[Series]:
    """The series among a session's files, by name. Headers of NIfTI are read only where the name says T1."""
    names = sorted(name for name in files if not posixpath.basename(name).startswith(".") and "__MACOSX" not in name)
    for name in (name for name in names if name.lower().endswith(NIFTI)):
        yield _nifti(name, files, first_bytes, rule)
    folders: dict[str, list[str]] = {}
    for name in names:
        if _maybe_dicom(name):
            folders.setdefault(posixpath.dirname(name) or ".", []).append(name)
    for folder, members in folders.items():
        named = [name for name in members if name.lower().endswith(DICOM)]
        if named or _is_dicom(members[0], first_bytes):
            yield _dicom(folder, tuple(named or members), first_bytes)


def _nifti(name: str, files: dict[str, str], first_bytes: Callable, rule: T1Rule) -> Series:
    stem = name[: -len(".nii.gz" if name.lower().endswith(".gz") else ".nii")]
    is_twice = name.lower().endswith(".gz") and f"{stem}.nii" in files
    series = Series(name=name if is_twice else stem, files=(name,), is_dicom=False, description=stem)
    try:
        sidecar = json.loads(first_bytes(f"{stem}.json", 2**20)) if f"{stem}.json" in files else {}
    except ValueError:  # the name has to do
        sidecar = {}
    if isinstance(sidecar, dict) and sidecar:
        series = replace(
            series,
            description=_line(sidecar.get("SeriesDescription") or stem),
            protocol=_line(sidecar.get("ProtocolName") or ""),
            number=_int(sidecar.get("SeriesNumber")),
            field_strength_t=_tesla(sidecar.get("MagneticFieldStrength")),
        )
    if name_rank(series, rule) is None:
        return series
    try:
        shape, spacing_mm = read_nifti_header(first_bytes(name, 2**12))
    except ValueError as error:
        return replace(series, fault=f"{name}: {error}")
    return replace(series, shape=shape, spacing_mm=spacing_mm)


def read_nifti_header(start: bytes) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing (mm) from the first 4 KiB of a `.nii` or `.nii.gz`.

    Raises:
        ValueError: it is neither.
    """
    if start[:2] == b"\x1f\x8b":
        try:
            start = gzip.GzipFile(fileobj=BytesIO(start)).read1(540)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"not a NIfTI file ({error})") from error
    for endian in "<>":
        if len(start) >= 348 and start[:4] == struct.pack(f"{endian}i", 348):
            num_axes, *sizes = struct.unpack_from(f"{endian}8h", start, 40)
            spacing_mm = struct.unpack_from(f"{endian}4f", start, 76)[1:]
        elif len(start) >= 540 and start[:4] == struct.pack(f"{endian}i", 540):  # NIfTI-2
            num_axes, *sizes = struct.unpack_from(f"{endian}8q", start, 16)
            spacing_mm = struct.unpack_from(f"{endian}4d", start, 104)[1:]
        else:
            continue
        return tuple(sizes[: max(num_axes, 0)]), tuple(map(abs, spacing_mm))
    raise ValueError("no whole NIfTI header")


def _is_dicom(name: str, first_bytes: Callable[[str, int], bytes]) -> bool:
    try:
        return first_bytes(name, 132)[128:] == b"DICM"
    except ValueError:
        return False


def _dicom(folder: str, files: tuple[str, ...], first_bytes: Callable[[str, int], bytes]) -> Series:
    """The first, middle and last file are read: enough to see that files of several series were thrown together."""
    series = Series(name=folder, files=files, is_dicom=True, description=folder)
    try:
        some = sorted({files[0], files[len(files) // 2], files[-1]})
        headers = [read_dicom_header(first_bytes(name, HEADER_BYTES)) for name in some]
        head = headers[0]
        slices = max(len(files), _int(head.get("NumberOfFrames"), 1))
        spacing = [*(head.get("PixelSpacing") or ()), head.get("SpacingBetweenSlices") or head.get("SliceThickness")]
        series = replace(
            series,
            description=_line(head.get("SeriesDescription") or folder),
            protocol=_line(head.get("ProtocolName") or ""),
            number=_int(head.get("SeriesNumber")),
            field_strength_t=_tesla(head.get("MagneticFieldStrength")),
            shape=(_int(head.get("Columns"), 0), _int(head.get("Rows"), 0), slices),
            spacing_mm=tuple(map(float, spacing)) if len(spacing) == 3 and all(spacing) else (),
        )
    except (ValueError, TypeError) as error:
        return replace(series, fault=f"{folder}: {error}")
    if len({header.get("SeriesInstanceUID") for header in headers}) > 1:
        return replace(
            series, fault=f"{folder}: its {len(files)} DICOM files are of several series; sort them into folders"
        )
    return series


def read_dicom_header(start: bytes):
    """The tags that name and measure a series, from the first bytes of a DICOM file.

    Raises:
        ValueError: it is none.
    """
    from pydicom.filereader import read_partial

    try:
        return read_partial(BytesIO(start), stop_when=lambda tag, vr, length: tag > LAST_TAG)
    except Exception as error:  # pydicom has no type of its own for a damaged file
        raise ValueError(f"no DICOM header ({type(error).__name__}: {error})") from error


def _line(text: object) -> str:
    """The text on one line, as UTF-8 can write it."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


def _int(value: object, otherwise: int = 10**6) -> int:
    try:
        return int(str(value))
    except ValueError:
        return otherwise


def _tesla(value: object) -> float | None:
    try:
        strength = float(str(value))
    except ValueError:
        return None
    strength = strength / 10_000 if strength > 100 else strength  # some scanners write gauss
    return round(strength, 2) if 0.1 <= strength <= 15 else None


# --- 3. is it a T1 ---


def name_rank(series: Series, rule: T1Rule) -> int | None:
    """0 if the series' description says T1, 1 if only its protocol does, None if neither."""
    for rank, text in enumerate((series.description, series.protocol)):
        if rule.other_names.search(text):
            return None
        if rule.names.search(text):
            return rank
    return None


def why_no_head(series: Series, rule: T1Rule) -> str:
    """Why a series with a T1's name is no volume of a whole head; empty if it is one, or its header does not say."""
    if any(size > 1 for size in series.shape[3:]) or (series.shape and len(series.shape) < 3):
        return f"its shape is {'x'.join(map(str, series.shape))}, not one volume"
    if not series.spacing_mm:
        return ""
    cover_mm = [size * mm for size, mm in zip(series.shape[:3], series.spacing_mm, strict=True)]
    thick, thin = max(series.spacing_mm), min(series.spacing_mm)
    if thick > rule.max_slice_mm and thick > 1.5 * thin:
        return (
            f"slices of {thick:.3g} mm (voxels {thin:.3g} mm), acquired in 2-D (--max-slice-mm {rule.max_slice_mm:g})"
        )
    if min(cover_mm) < rule.min_cover_mm:
        return f"it covers {min(cover_mm):.0f} mm only, not a head (--min-cover-mm {rule.min_cover_mm:g})"
    return ""
