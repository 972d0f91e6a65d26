"""Whatever byte of a file changes, it is refused with a reason, or read; nothing crashes, hangs or fills memory.

What a change cannot hide from: in `.nii.gz` everything, for the checksum; in a raw header, shape, type, offset, units
and voxel size, which all have a second witness (the file's size, bitpix, pixdim against the sform).
What nobody can see in a raw file: a changed voxel, slope or intercept; a translation; the sign of an entry of the
sform, which mirrors or turns; less than 1 % of a voxel size; float32 against int32, as both have 32 bits; and in a
header with a qform alone, its quaternion and its voxel size within the limits of a head. Keep scans as `.nii.gz`.
"""

import gzip
import resource
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicoms import write_series

from medblip.image import read_image
from medblip.volume import Recipe, prepare

RECIPE = Recipe("standard", 24, 8.0)
MAX_FILE_S = 10.0
MAX_RSS_KB = 2 * 2**20
SIZES_MM = np.array([2.9, 3.1, 3.3])
AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.05, -0.08) * SIZES_MM, [-30, -40, -20])


def picture(dtype=np.int16) -> np.ndarray:
    array = np.random.default_rng(3).integers(0, 90, (20, 19, 18))
    array[4:15, 3:16, 5:14] += 100
    return array.astype(dtype)


def write(folder: Path, name: str, dtype=np.int16) -> Path:
    kind = nib.AnalyzeImage if name.startswith("analyze") else nib.Nifti1Pair if name.endswith(".img") else None
    kind = kind or (nib.Nifti2Image if "2" in name else nib.Nifti1Image)
    image = kind(picture(dtype), AFFINE)
    if kind is nib.Nifti1Image:
        image.set_qform(AFFINE, 1)
    nib.save(image, folder / name)
    return folder / name


def outcome(path: Path, function=read_image):
    """What `function` makes of a file, None if it refuses it; anything else than either fails the test."""
    started_at = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own remarks on damaged values
            return function(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) > len(f"{path}: "), error
        return None
    finally:
        assert time.monotonic() - started_at < MAX_FILE_S
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MAX_RSS_KB


def damaged(data: bytes, random: np.random.Generator, first: int = 0) -> bytes:
    """One to eight bytes changed, anywhere from `first` on."""
    changed = bytearray(data)
    for at in random.integers(first, len(data), random.integers(1, 9)):
        changed[at] ^= random.integers(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["a.nii", "a2.nii", "a.img", "analyze.img", "a.nii.gz"])
def test_random_bytes_never_crash_the_reader(tmp_path, name, seed):
    """250 files, damaged anywhere and in the header, through the whole preparation."""
    path = write(tmp_path, name)
    target = path.with_suffix(".hdr") if name.endswith(".img") else path
    good, random = target.read_bytes(), np.random.default_rng(seed)
    for number in range(25):
        header = good[:600] if number % 2 else good
        target.write_bytes(damaged(header, random) + good[len(header) :])
        outcome(path, lambda image: prepare(image, RECIPE))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_change_of_a_packed_file_goes_unseen(tmp_path, seed):
    """150 files; a byte that gzip's checksum does not cover, such as its time stamp, changes no voxel."""
    path = write(tmp_path, "a.nii.gz")
    good, random = path.read_bytes(), np.random.default_rng(seed)
    array, affine = read_image(path)
    refused = 0
    for _ in range(50):
        path.write_bytes(damaged(good, random))
        found = outcome(path)
        refused += found is None
        if found is not None:
            np.testing.assert_array_equal(found[0], array)
            np.testing.assert_array_equal(found[1], affine)
    assert refused > 40


def test_every_bit_of_a_packed_files_frame_is_watched(tmp_path):
    path = write(tmp_path, "a.nii.gz")
    good = path.read_bytes()
    array, affine = read_image(path)
    for at in [*range(30), *range(len(good) - 10, len(good))]:
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            found = outcome(path)
            if found is not None:
                np.testing.assert_array_equal(found[0], array)
                np.testing.assert_array_equal(found[1], affine)


SECOND_WITNESS = [
    "sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "xyzt_units", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "magic",
]  # fmt: skip


@pytest.mark.parametrize("field", [*SECOND_WITNESS, "srow_x", "srow_y", "srow_z", "scl_slope", "scl_inter"])
def test_every_bit_of_a_raw_headers_geometry_has_a_second_witness(tmp_path, field):
    """Each bit of the field flipped: refused, or the same image. The rest is listed at the top of this file."""
    path = write(tmp_path, "a.nii")
    good = path.read_bytes()
    array, affine = read_image(path)
    kind, first = nib.Nifti1Header.template_dtype.fields[field][:2]
    refused = 0
    for at in range(first, first + kind.itemsize):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            found = outcome(path)
            refused += found is None
            if found is None or field.startswith("scl_"):
                continue
            if field.startswith("srow"):
                sizes_mm = np.linalg.norm(found[1][:3, :3], axis=0)
                np.testing.assert_allclose(np.sort(sizes_mm), np.sort(SIZES_MM), rtol=0.011)
            else:
                np.testing.assert_array_equal(found[0], array)
                np.testing.assert_allclose(found[1], affine, atol=1e-3)
    if field in ("sizeof_hdr", "dim", "datatype", "bitpix", "vox_offset", "magic"):
        assert refused > 0


def test_a_damaged_slice_never_crashes_the_reader(tmp_path):
    folder = write_series(tmp_path / "series", picture(), AFFINE)
    path = folder / "0009.dcm"
    good, random = path.read_bytes(), np.random.default_rng(0)
    headers = len(good) - 20 * 19 * 2
    for number in range(100):
        data = damaged(good[:headers], random) + good[headers:] if number % 4 else good[: random.integers(len(good))]
        path.write_bytes(data)
        outcome(folder)


def test_a_gzip_of_noise_and_a_header_of_noise_are_refused(tmp_path):
    random = np.random.default_rng(0)
    for number in range(100):
        noise = random.bytes(5000)
        name, data = [("a.nii", noise), ("a.nii.gz", gzip.compress(noise)), ("a.nii.gz", b"\x1f\x8b\x08\0" + noise)][
            number % 3
        ]
        (tmp_path / name).write_bytes(data)
        assert outcome(tmp_path / name) is None
