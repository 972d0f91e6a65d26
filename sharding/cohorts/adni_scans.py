"""The images of an ADNI download, and what the tables and sidecars about images say of them.

1. walk the folders: a NIfTI or Analyze file is an image, and so is a folder of DICOM files;
2. fill in what names and folders do not say: from the lists of images (several kinds of table), by image id, else from
   the image's XML sidecar;
3. drop what is no whole-head T1, failed the archive's quality control, or contradicts itself.

The number in a processed image's name (`_Br_20070219173850420_`) is when the archive made it, not when it was acquired.
"""

import datetime
import logging
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

from sharding.cohorts.adni_tables import MISSING, PTID, read_date
from sharding.release import FoundScan, Release, drop_copies, files_below
from sharding.tables import Entry, Row, TablesFolder, find_by_header, find_table, index_rows, read_table

log = logging.getLogger(__name__)

SUFFIXES = (".nii", ".nii.gz", ".img", ".img.gz", ".mnc")
IDS_IN_NAME = re.compile(r"(?:_S(?P<series>\d+))?_I(?P<image>\d+)(?:\.nii|\.img)?\.[a-z]+$", re.IGNORECASE)
NAME = re.compile(r"ADNI_\d{3}_S_\d{4,5}_(?P<modality>[A-Z]+)_(?P<description>.*?)_br_.*", re.IGNORECASE)
FOLDER_DATE = re.compile(r"(\d{4}-\d{2}-\d{2})_\d{2}_\d{2}_\d{2}(?:\.\d+)?")

T1 = re.compile(r"mp_?rage|(^|_)mpr(_|$)|spgr|(^|_)m?t1(_|$)|bravo|(^|_)tfl(_|$)")
ANOTHER_WEIGHTING = re.compile(r"(^|_)(t2|pd|dti|dwi|asl|fmri|epi|gre|swi)(_|$)|flair|perfusion|hippocamp")
NO_HEAD = re.compile(
    r"mask|spatially_normalized|(^|_)harp(_|$)|hhp_6_dof|locali[sz]er|scout|survey|(^|_)(3_)?plane_loc|(^|_)loc(_|$)"
    r"|freesurfer|jacobian|segment|calibration"
)
SAME_ACQUISITION_DAYS = 7
"""A table's date and a folder's may differ by this much; swapped days and months differ by more."""


@dataclass(frozen=True)
class ListOfImages:
    """One kind of table that has a row for each image; a column that is not in the table is empty."""

    marks: tuple[str, ...]
    """Columns by which the kind is known; the first holds the image id."""
    subject: str
    date: str
    description: str
    needed: tuple[str, ...] = ()
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    field_strength: str = ""
    group: str = ""
    visit: str = ""


LISTS = (
    ListOfImages(  # the CSV of a collection: what most people have beside the zip
        marks=("Image Data ID",),
        subject="Subject",
        date="Acq Date",
        description="Description",
        needed=("Subject", "Acq Date"),
        group="Group",
        visit="Visit",
    ),
    ListOfImages(  # idaSearch_*.csv
        marks=("Image ID", "Subject ID"), subject="Subject ID", date="Study Date", description="Description"
    ),
    ListOfImages(  # All_Subjects_Key_MRI, and tables of MRI images from the ARC builder
        marks=("image_id", "subject_id"),
        subject="subject_id",
        date="image_date",
        description="series_description",
        needed=("image_date",),
        names={"image_date": ("mri_date", "pet_date"), "series_description": ("mri_description", "image_description")},
        field_strength="mri_field_str",
        visit="mri_visit",
    ),
    ListOfImages(  # MPRAGEMETA
        marks=("ImageUID", "SubjectID"),
        subject="SubjectID",
        date="ScanDate",
        description="Sequence",
        needed=("ScanDate",),
        field_strength="MagStrength",
        visit="Visit",
    ),
    ListOfImages(  # MRILIST
        marks=("IMAGEUID", "SCANDATE", "MAGSTRENGTH"),
        subject="SUBJECT",
        date="SCANDATE",
        description="SEQUENCE",
        field_strength="MAGSTRENGTH",
        visit="VISIT",
    ),
)


@dataclass
class Image:
    """An image as its name and its folders have it; unknown text is empty."""

    path: Path
    """A file, or the folder of a DICOM series."""
    place: str
    """Below the folder of all images."""
    subject_id: str = ""
    image_id: str = ""
    """Digits only."""
    series_id: str = ""
    modality: str = ""
    description: str = ""
    when: datetime.date | None = None
    group: str = ""
    visit: str = ""
    field_strength_t: float | None = None
    problem: tuple[str, str] = ("", "")
    """Why it cannot be used: a reason, and a detail."""


def find_scans(images: Path, tables: TablesFolder, release: Release) -> list[FoundScan]:
    """The scans that can be used, each image once; all others are dropped from `release` with a reason."""
    found, sidecars = _walk(images)
    listed = _read_lists(tables, {image.image_id for image in found} - {""}, release.faults)
    quality = _read_quality(tables, release.faults)
    scans = []
    for image in found:
        for rows in listed:
            if entry := rows.get(image.image_id):
                _take(image, entry.values, entry.where, entry.fault)
        if image.image_id in sidecars and not (image.when and image.description and image.field_strength_t):
            _take(image, _read_sidecar(sidecars[image.image_id], release.faults), str(sidecars[image.image_id]))
        scan = _scan(image)
        reason, detail = image.problem if image.problem[0] else _why_not(image, quality.get(image.series_id))
        if reason:
            release.drop(scan, reason, detail)
        else:
            scans.append(scan)
    return drop_copies(release, scans)


def _walk(images: Path) -> tuple[list[Image], dict[str, Path]]:
    """Every image, NIfTI before DICOM, and the XML sidecars by image id."""
    files, series, sidecars, num_zips = [], [], {}, 0
    for folder, names in files_below(images):
        dicom: dict[str, str] = {}  # one name of each image id
        for name in names:
            lower = name.lower()
            numbered = IDS_IN_NAME.search(name)
            if lower.endswith(SUFFIXES):
                files.append(_image(images, folder / name, folder, name))
            elif lower.endswith(".dcm"):
                dicom.setdefault(numbered["image"] if numbered else "", name)
            elif lower.endswith(".xml") and numbered:
                sidecars[numbered["image"]] = folder / name
            num_zips += lower.endswith(".zip")
        for name in dicom.values():
            image = _image(images, folder, folder, name)
            if len(dicom) > 1:
                ids = ", ".join(f"I{number}" for number in sorted(dicom))
                mend = f"{image.place} has {ids}; move the files of each (named _I....dcm) to a folder of its own"
                image.problem = "a DICOM folder with several images", mend
            series.append(image)
    if num_zips:
        log.warning("%s: %d zip files are passed over; unpack them, side by side", images, num_zips)
    return [*files, *series], sidecars


def _image(images: Path, path: Path, folder: Path, name: str) -> Image:
    """What PTID/DESCRIPTION/DATE/ID/NAME says, as far as the folders are there."""
    parts = folder.relative_to(images).parts
    image = Image(path, path.relative_to(images).as_posix())
    below = next((n for n in reversed(range(len(parts))) if PTID.fullmatch(parts[n])), None)
    if below is not None:
        image.subject_id = parts[below]
        for part in parts[below + 1 :]:
            if dated := FOLDER_DATE.fullmatch(part):
                image.when = _iso_date(dated[1])
            elif not image.description and not re.fullmatch(r"[IS]\d+", part):
                image.description = part
    named = NAME.match(name)
    if named:
        image.modality = named["modality"].upper()
        image.description = image.description or named["description"]
    numbered, leaf = IDS_IN_NAME.search(name), folder.name
    if numbered:
        image.image_id, image.series_id = numbered["image"], numbered["series"] or ""
    elif re.fullmatch(r"I\d+", leaf):
        image.image_id = leaf[1:]
    if not image.series_id and re.fullmatch(r"S\d+", leaf):
        image.series_id = leaf[1:]
    subject = PTID.search(name)
    if subject and image.subject_id and subject[1] != image.subject_id:
        image.problem = "file and folder name different subjects", f"{subject[1]} in {image.place}"
    image.subject_id = image.subject_id or (subject[1] if subject else "")
    if not image.subject_id:
        image.problem = "no subject in the name", f"expected PTID/DESCRIPTION/DATE/I12345/ or 012_S_3456 in {name!r}"
    return image


def _iso_date(text: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return None


def _read_lists(folder: TablesFolder, wanted: set[str], faults: list[str]) -> list[dict[str, Entry]]:
    """For each kind of list, its rows of the wanted images by image id."""
    listed, names = [], []
    for kind in LISTS:
        paths = find_by_header(folder, kind.marks)
        names += [path.name for path in paths]
        rows = chain.from_iterable(read_table(path, (*kind.marks, *kind.needed), kind.names) for path in paths)
        listed.append(index_rows(rows, _key_of(kind, wanted), _values_of(kind), faults))
    log.info("lists of images: %s", ", ".join(names) or "none; dates come from the folders")
    return listed


def _key_of(kind: ListOfImages, wanted: set[str]):
    def key(row: Row) -> str | None:
        number = row[kind.marks[0]].lstrip("IDS")
        return number if number in wanted else None

    return key


def _values_of(kind: ListOfImages):
    def values(row: Row) -> dict[str, object]:
        field_strength_t = None
        if kind.field_strength in row:
            field_strength_t = row.number(kind.field_strength, 0.1, 12, MISSING)
        return {
            "subject_id": row.text(kind.subject),
            "when": read_date(row, kind.date),
            "description": row.text(kind.description),
            "group": row.text(kind.group),
            "visit": row.text(kind.visit),
            "field_strength_t": field_strength_t,
        }

    return values


def _read_quality(folder: TablesFolder, faults: list[str]) -> dict[str, Entry]:
    """MRIQUALITY by the digits of the series id; a table that most people do not have."""
    path = find_table(folder, ["All_Subjects_MRIQUALITY", "MRIQUALITY"], required=False)
    if path is None:
        return {}

    def key(row: Row) -> str:
        return row.text("LONIUID").lstrip("IS")

    def values(row: Row) -> dict[str, object]:
        return {"pass": row.code("PASS", {"1": "1", "0": "0"}, MISSING)}

    return index_rows(read_table(path, ["LONIUID", "PASS"]), key, values, faults)


def _read_sidecar(path: Path, faults: list[str]) -> dict[str, object]:
    """The XML file of one image. One that cannot be read is a fault and tells nothing."""
    try:
        root = ElementTree.parse(path).getroot()
        fields = {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root.iter()}
        terms = {element.get("term"): (element.text or "").strip() for element in root.iter() if element.get("term")}
        field_strength = terms.get("Field Strength", "")
        return {
            "subject_id": fields.get("subjectIdentifier", ""),
            "when": _iso_date(fields.get("dateAcquired", "")[:10]),
            "description": fields.get("processedDataLabel") or fields.get("description", ""),
            "group": fields.get("researchGroup", ""),
            "visit": fields.get("visitIdentifier", ""),
            "field_strength_t": float(field_strength) if field_strength else None,
        }
    except (ElementTree.ParseError, ValueError, OSError) as error:
        faults.append(f"{path}: cannot be read ({error})")
        return {}


def _take(image: Image, values: dict[str, object], where: str, fault: str = "") -> None:
    """Fills in what the image does not know yet, and notes where it knows better."""
    if fault:
        image.problem = "a table's cell cannot be used", fault
    if image.problem[0] or not values:
        return
    if values["subject_id"] and values["subject_id"] != image.subject_id:
        detail = f"{where}: I{image.image_id} is of {values['subject_id']}, not {image.subject_id} ({image.place})"
        image.problem = "table and folder name different subjects", detail
    when = values["when"]
    if when and image.when and abs((when - image.when).days) > SAME_ACQUISITION_DAYS:
        detail = f"{where}: I{image.image_id} was acquired {when}, not {image.when} ({image.place})"
        image.problem = "two dates of acquisition", detail
    for name in ("when", "description", "group", "visit", "field_strength_t"):
        setattr(image, name, getattr(image, name) or values[name])


def _words(description: str) -> str:
    """In lower case with single underscores: folders and tables write a description differently."""
    return re.sub(r"[^a-z0-9]+", "_", description.lower()).strip("_")


def _why_not(image: Image, quality: Entry | None) -> tuple[str, str]:
    """The reason and the detail for leaving an image out; empty if it is used."""
    words, shown = _words(image.description), f"{image.modality} {image.description}".strip()
    if image.path.suffix.lower() == ".mnc":
        return "MINC files are not read", "download the NIfTI version"
    if not words:
        return "no description of the image", "put the collection's CSV into the folder of --tables"
    if NO_HEAD.search(words):
        return "a mask, map or localizer", shown
    if image.modality not in ("", "MR", "MRI") or not T1.search(words) or ANOTHER_WEIGHTING.search(words):
        return "not a T1-weighted MRI", shown
    if quality is not None and quality.fault:
        return "a table's cell cannot be used", quality.fault
    if quality is not None and quality.values["pass"] == "0":
        return "failed ADNI's quality control", f"{quality.where}: PASS 0 for series S{image.series_id}"
    return "", ""


def _scan(image: Image) -> FoundScan:
    return FoundScan(
        scan_id=f"I{image.image_id}" if image.image_id else image.place,
        subject_id=image.subject_id,
        session_id=image.when.isoformat() if image.when else "",
        image=image.path,
        when=image.when,
        values={
            "field_strength_t": image.field_strength_t,
            "description": image.description,
            "image_kind": kind_of(image.description),
            "group": image.group,
            "scan_visit": image.visit,
        },
    )


def kind_of(description: str) -> str:
    """How far the archive has processed an image: n3-scaled, n3, corrected; or an original: accelerated, plain, nd.

    `nd` is an original without distortion correction.
    """
    words = _words(description)
    if re.search(r"(^|_)n3m?(_|$)", words):
        return "n3-scaled" if "scaled" in words else "n3"
    if "gradwarp" in words or "b1_correction" in words:
        return "corrected"
    if words.endswith("_nd"):
        return "nd"
    return "accelerated" if "accel" in words else "plain"


def is_repeat(description: str) -> bool:
    """Whether it is the second image of a session: `MPR-R` or `MPRAGE REPEAT`."""
    return re.search(r"(^|_)mpr_+r(_|$)|repeat", _words(description)) is not None
