"""A folder of DICOM files is an image if it holds one stack of slices, and is refused with its reason if not."""

import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ROOT, require_tool
from dicoms import text, write_series
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedMRImageStorage, RLELossless, generate_uid

from medblip import dicom
from medblip.image import image_sha256
from medblip.volume import Recipe, place, prepare, read_image

REAL = Path(os.environ.get("MEDBLIP_REAL_DATA", ROOT.parent / "shared" / "real")) / "dicom" / "sag_mprage"
RECIPE = Recipe("standard", 32, 6.0)
SHAPE = (24, 20, 18)

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real series {REAL} (or MEDBLIP_REAL_DATA)")
needs_converter = pytest.mark.usefixtures("converter")


@pytest.fixture
def converter():
    if not Path(sys.executable).with_name("dcm2niix").exists():
        require_tool("dcm2niix", 'pip install "medblip[dicom]"')


def voxels(dtype=np.int16, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 250, shape).astype(dtype)


def sagittal(spacing_mm=(2.5, 2.5, 2.8), turn_degrees=0.0) -> np.ndarray:
    """Columns to the back, rows down, slices from right to left, tipped by some degrees."""
    axes = np.array([[0, 0, -1.0], [-1, 0, 0], [0, -1, 0]])
    angle = np.deg2rad(turn_degrees)
    tip = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tip @ axes @ np.diag(spacing_mm)
    affine[:3, 3] = [30, 40, 50]
    return affine


def expected(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    orientation = nib.io_orientation(affine)
    return nib.apply_orientation(array, orientation), affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("turn_degrees", [0, 20])
def test_voxels_lie_where_the_headers_say(tmp_path, dtype, turn_degrees):
    array, affine = voxels(dtype), sagittal(turn_degrees=turn_degrees)
    if dtype == np.int16:
        array -= 100
    read, read_affine = read_image(write_series(tmp_path / "s", array, affine))
    right, right_affine = expected(array, affine)
    np.testing.assert_array_equal(read, right)
    np.testing.assert_allclose(read_affine, right_affine, atol=1e-5)


def test_order_comes_from_positions_whatever_the_names_and_numbers(tmp_path):
    order = np.random.default_rng(1).permutation(SHAPE[2])

    def renumber(n, slice_):
        slice_.InstanceNumber = int(order[n])

    plain = write_series(tmp_path / "plain", voxels(), sagittal())
    shuffled = write_series(tmp_path / "shuffled", voxels(), sagittal(), renumber, lambda n: f"IM{order[n]:05d}")
    np.testing.assert_array_equal(read_image(plain)[0], read_image(shuffled)[0])
    np.testing.assert_array_equal(read_image(plain)[1], read_image(shuffled)[1])


def test_every_slice_has_its_own_slope(tmp_path):
    def scale(n, slice_):
        slice_.RescaleSlope, slice_.RescaleIntercept = text(1 + n / 10), text(-n)

    array = voxels()
    n = np.arange(SHAPE[2])
    read, _ = read_image(write_series(tmp_path / "s", array, sagittal(), scale))
    np.testing.assert_allclose(read, expected(array * (1 + n / 10) - n, sagittal())[0], rtol=1e-6, atol=1e-4)


def test_whatever_else_lies_in_the_folder_is_ignored(tmp_path):
    folder = write_series(tmp_path / "s", voxels(), sagittal())
    (folder / "notes.txt").write_text("scan 3 of 5")
    (folder / "empty.dcm").touch()
    (folder / "DICOMDIR").write_bytes(next(folder.glob("*.dcm")).read_bytes())
    (folder / "deeper").mkdir()
    report = pydicom.dcmread(folder / "0000.dcm")
    for tag in ("PixelData", "Rows", "Columns"):
        delattr(report, tag)
    report.SeriesInstanceUID = generate_uid()
    report.save_as(folder / "report.dcm")
    assert read_image(folder)[0].shape == (18, 24, 20)


def test_a_folders_sha256_is_of_its_files_not_of_their_names(tmp_path):
    folder = write_series(tmp_path / "s", voxels(), sagittal())
    found = image_sha256(folder)
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{(n * 7) % 18}.ima")
    (folder / "notes.txt").write_text("x")
    assert image_sha256(folder) == found
    last = folder / "0.ima"
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")
    assert image_sha256(folder) != found


def at(slices, **tags):
    def change(n, slice_):
        if n in slices:
            for tag, value in tags.items():
                setattr(slice_, tag, value)

    return change


def move(n_moved, mm):
    def change(n, slice_):
        if n == n_moved:
            slice_.ImagePositionPatient = [float(slice_.ImagePositionPatient[0]) + mm, *slice_.ImagePositionPatient[1:]]

    return change


def series_without(folder, *slices):
    write_series(folder, voxels(shape=(24, 20, 22)), sagittal())
    for n in slices:
        (folder / f"{n:04d}.dcm").unlink()


def two_series(folder):
    write_series(folder, voxels(), sagittal())
    write_series(folder, voxels(shape=(24, 20, 3)), sagittal(), at(range(3), SeriesDescription="scout",
                 SeriesInstanceUID="1.2.3"), "scout{}".format)  # fmt: skip


def localizer(folder):
    along = np.eye(3)[[[0, 1], [1, 2], [0, 2]]].reshape(3, 6).tolist()
    write_series(folder, voxels(), sagittal(), lambda n, s: setattr(s, "ImageOrientationPatient", along[n % 3]))


def mixed_size(folder):
    write_series(folder, voxels(), sagittal())
    other = pydicom.dcmread(folder / "0004.dcm")
    other.Rows, other.PixelData = 10, other.PixelData[: len(other.PixelData) // 2]
    other.save_as(folder / "0004.dcm")


def doubled(folder):
    write_series(folder, voxels(), sagittal())
    shutil.copy(folder / "0003.dcm", folder / "copy.dcm")


def cut_short(folder):
    write_series(folder, voxels(), sagittal())
    (folder / "0005.dcm").write_bytes((folder / "0005.dcm").read_bytes()[:-50])


def colour(folder):
    def to_rgb(n, slice_):
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PlanarConfiguration = 3, "RGB", 0
        slice_.PixelData *= 3

    write_series(folder, voxels(np.uint8), sagittal(), to_rgb)


def empty(folder):
    folder.mkdir()


def no_image(folder):
    series_without(folder)
    for path in folder.iterdir():
        report = pydicom.dcmread(path)
        del report.Rows, report.PixelData
        report.save_as(path)


def plain(change, **more):
    return lambda folder: write_series(folder, voxels(), more.get("affine", sagittal()), change)


BAD = {
    "several series": (two_series, r"holds 2 series \('T1' with 18 images, 'scout' with 3 images\)"),
    "missing slice": (
        lambda f: series_without(f, 7),
        "1 slice missing: 5.6 mm between .*, 2.8 mm",
    ),
    "missing slices": (lambda f: series_without(f, 7, 8), "2 slices missing: 8.4 mm"),
    "irregular": (plain(move(9, 0.9)), "not evenly spaced: (3.7|1.9) mm between .*, 2.8 mm elsewhere"),
    "doubled position": (doubled, "lie at one position"),
    "localizer": (localizer, "slices lie in 3 orientations: a localizer"),
    "sizes": (mixed_size, "slices differ in size: 10x24 and 20x24"),
    "spacings": (plain(at([5], PixelSpacing=["2", "2"])), "slices differ in pixel spacing: 2.5 x 2.5 mm and 2 x 2 mm"),
    "shifted": (
        plain(lambda n, s: setattr(s, "ImagePositionPatient", [*s.ImagePositionPatient[:2], 50 + 0.5 * n])),
        "shifted sideways by .* mm",
    ),
    "few slices": (lambda f: series_without(f, *range(10)), r"shape \(24, 20, 12\) is not within 16"),
    "one slice": (lambda f: series_without(f, *range(1, 22)), "holds one slice"),
    "wide gaps": (plain(at([]), affine=sagittal((2.5, 2.5, 5.0))), "slice gap of 5 mm"),
    "no DICOM": (empty, "folder without DICOM files"),
    "no image": (no_image, "no image among its DICOM files"),
    "no position": (plain(lambda n, s: delattr(s, "ImagePositionPatient")), "without ImagePositionPatient"),
    "colour": (colour, "is a colour image"),
    "inverted": (plain(at(range(18), PhotometricInterpretation="MONOCHROME1")), "MONOCHROME1"),
    "cut short": (cut_short, "0005.dcm cannot be read"),
    "huge": (plain(at(range(18), Rows=60000, Columns=60000)), "is not within"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_one_stack_is_refused_with_the_reason(tmp_path, fault):
    make, reason = BAD[fault]
    make(tmp_path / "series")
    with pytest.raises(ValueError, match=f"^{tmp_path}/series: .*{reason}"):
        prepare(tmp_path / "series", RECIPE)


def compress(folder: Path, syntax) -> None:
    for path in folder.iterdir():
        slice_ = pydicom.dcmread(path)
        slice_.compress(syntax)
        slice_.save_as(path)


def test_compressed_files_without_a_converter_are_refused_with_its_name(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "s", voxels(), sagittal())
    compress(folder, RLELossless)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ValueError, match=r'compressed \(RLE Lossless\); .* pip install "medblip\[dicom\]"'):
        read_image(folder)


@needs_converter
def test_compressed_files_give_the_same_voxels(tmp_path):
    folder = write_series(tmp_path / "s", voxels(), sagittal(turn_degrees=5))
    before = read_image(folder)
    compress(folder, RLELossless)
    after = read_image(folder)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(before[1], after[1], atol=1e-3)


def enhanced(folder: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """The series as one file of many frames."""
    plain = write_series(folder, array, affine)
    slices = [pydicom.dcmread(path) for path in sorted(plain.iterdir())]
    whole = slices[0].copy()
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    whole.NumberOfFrames = len(slices)
    whole.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    whole.PixelData = b"".join(slice_.PixelData for slice_ in slices)
    whole.PerFrameFunctionalGroupsSequence = []
    for n, slice_ in enumerate(slices, start=1):
        frame, position, content, measures, plane = (Dataset() for _ in range(5))
        position.ImagePositionPatient = slice_.ImagePositionPatient
        plane.ImageOrientationPatient = slice_.ImageOrientationPatient
        measures.PixelSpacing, measures.SliceThickness = slice_.PixelSpacing, slice_.SliceThickness
        content.DimensionIndexValues, content.InStackPositionNumber, content.StackID = [1, n], n, "1"
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = [position], [plane]
        frame.PixelMeasuresSequence, frame.FrameContentSequence = [measures], [content]
        whole.PerFrameFunctionalGroupsSequence.append(frame)
    for path in plain.iterdir():
        path.unlink()
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(whole, tag)
    whole.save_as(plain / "all.dcm")
    return plain


@needs_converter
def test_many_frames_in_one_file_give_the_same_voxels(tmp_path):
    expected_voxels, expected_affine = read_image(write_series(tmp_path / "plain", voxels(), sagittal()))
    found, affine = read_image(enhanced(tmp_path / "enhanced", voxels(), sagittal()))
    np.testing.assert_array_equal(found, expected_voxels)
    np.testing.assert_allclose(affine, expected_affine, atol=1e-3)


@needs_converter
def test_what_the_converter_cannot_make_one_image_of_is_refused(tmp_path):
    folder = write_series(tmp_path / "s", voxels(), sagittal())
    for path in folder.iterdir():
        data = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        path.write_bytes(data)
    with pytest.raises(ValueError, match="dcm2niix made"):
        read_image(folder)


@needs_real
@needs_converter
def test_a_real_series_reads_as_dcm2niix_converts_it(tmp_path):
    ours, affine = read_image(REAL)
    theirs, their_affine = read_image(dicom.convert(REAL, tmp_path, "a test"))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(affine, their_affine, atol=1e-3)


@needs_real
def test_a_real_head_hangs_from_the_top_of_its_grid():
    """The vertex narrows below 10 mm of air, and the sides mirror each other; which side is front: test_volume.py."""
    prepared = prepare(REAL, Recipe("standard", 112, 2.0))
    grid = place(prepared.volume_XYZ, prepared.pad_before, 112).astype(float)
    head = grid > 40
    area = head.sum(axis=(0, 1))
    assert area[-4:].max() < 0.02 * area.max()
    assert 0 < area[-8:-5].mean() < 0.5 * area[60:80].mean()
    assert np.corrcoef(grid[:56][::-1].ravel(), grid[56:].ravel())[0, 1] > 0.7
