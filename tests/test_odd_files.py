"""Every kind of file that lies in real folders, packed as a user would: it comes out right, or with its reason."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ROOT
from dicoms import text, write_series

from medblip.volume import Recipe, prepare

RECIPE = Recipe("standard", 32, 6.0)
SPACING_MM = np.array([3.0, 3.2, 3.4])
AFFINE = np.diag([*SPACING_MM, 1.0])
MAX_RSS_BYTES = 2 * 2**30
TIMEOUT_S = 240
PACKED = None  # instead of the words of a reason


def octant(dtype=np.int16) -> np.ndarray:
    """RAS+, noise, and twice as bright in the left front upper octant, so that no turn or mirror looks the same."""
    array = np.random.default_rng(7).integers(380, 420, (22, 26, 20))
    array[:11, 13:, 10:] *= 2
    return (array // 4 if np.dtype(dtype).itemsize == 1 else array).astype(dtype)


def is_octant(volume_XYZ: np.ndarray) -> bool:
    """Whether a prepared volume has the bright octant at its place."""
    x, y, z = (n // 2 for n in volume_XYZ.shape)
    octants = {
        (left, front, up): volume_XYZ[
            slice(0, x - 1) if left else slice(x + 1, None),
            slice(y + 1, None) if front else slice(0, y - 1),
            slice(z + 1, None) if up else slice(0, z - 1),
        ].mean()
        for left in (0, 1)
        for front in (0, 1)
        for up in (0, 1)
    }
    bright = octants.pop((1, 1, 1))
    return bright > 1.5 * max(octants.values()) + 20


def in_axes(axes: str, array: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The octant stored with other axes, and its affine."""
    array = octant() if array is None else array
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes))
    )
    return nib.apply_orientation(array, turn), AFFINE @ nib.orientations.inv_ornt_aff(turn, array.shape)


def nifti(path: Path, array=None, affine=AFFINE, kind=nib.Nifti1Image, **fields) -> Path:
    """An image by nibabel, with fields of its header set as given, whatever they do to it."""
    image = kind(octant() if array is None else array, affine)
    nib.save(image, path)
    return patched(path, **fields) if fields else path


def patched(path: Path, **fields) -> Path:
    packed = path.name.endswith(".gz")
    data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def raw() -> bytes:
    """A good .nii file's bytes."""
    return nib.Nifti1Image(octant(), AFFINE).to_bytes()


def of_bytes(name: str, make):
    """A file of the bytes that `make` makes of a good .nii file's."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(make(raw()))
        return folder / name

    return write


def by_nifti(name: str = "a.nii", array=None, **fields):
    """A file by nibabel with some of its header's fields set."""
    return lambda folder: nifti(folder / name, None if array is None else array(), **fields)


def changed(data: bytes, at: int, value: int) -> bytes:
    data = bytearray(data)
    data[at] ^= value
    return bytes(data)


def pair(folder: Path, stem="a", kind=nib.Nifti1Pair, axes="RAS", orient: int | None = None, affine=True) -> Path:
    array, its_affine = in_axes(axes)
    image = kind(array, its_affine if affine else None)
    if not affine:
        image.header.set_zooms(np.linalg.norm(its_affine[:3, :3], axis=0))
    if orient is not None:
        image.header["orient"] = bytes([orient])
    path = folder / f"{stem}.hdr"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, folder / f"{stem}.img")
    return path


def then(make, change):
    """What `make` wrote, and `change` altered; `change` may return another path."""

    def write(folder: Path) -> Path:
        path = make(folder)
        return change(path) or path

    return write


def packed_pair(folder: Path) -> Path:
    path = pair(folder)
    for file in (path, path.with_suffix(".img")):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return folder / "a.hdr.gz"


def swapped_pair(path: Path) -> None:
    header, voxels = path.read_bytes(), path.with_suffix(".img").read_bytes()
    path.write_bytes(voxels)
    path.with_suffix(".img").write_bytes(header)


def series(change=lambda n, slice_: None, name="{:03d}.dcm".format, array=None, spacing_mm=None):
    def write(folder: Path) -> Path:
        stored, affine = in_axes("PIL", array)
        affine = affine @ np.diag([1, 1, (spacing_mm or SPACING_MM[0]) / SPACING_MM[0], 1])
        return write_series(folder / "series", stored, affine, change, name)

    return write


def two_series(folder: Path) -> None:
    for path in sorted(folder.iterdir())[:5]:
        slice_ = pydicom.dcmread(path)
        slice_.SeriesInstanceUID, slice_.SeriesDescription = "1.2.3", "scout"
        slice_.save_as(folder / f"scout-{path.name}")


def other_size(folder: Path) -> None:
    slice_ = pydicom.dcmread(folder / "003.dcm")
    slice_.Rows -= 4
    slice_.PixelData = slice_.PixelData[: slice_.Rows * slice_.Columns * 2]
    slice_.save_as(folder / "003.dcm")


def with_tag(tag: str, value_of):
    return lambda n, slice_: setattr(slice_, tag, value_of(n))


THREE_WAYS = np.eye(3)[[[0, 1], [1, 2], [0, 2]]].reshape(3, 6).tolist()


def rescaled(n, slice_):
    slice_.RescaleSlope = text(1 + n % 2)
    slice_.PixelData = (np.frombuffer(slice_.PixelData, np.int16) // (1 + n % 2)).astype(np.int16).tobytes()


def in_folder_of(release: str, name: str, axes: str, orient: int):
    return lambda folder: pair(folder / release, name, nib.AnalyzeImage, axes, orient, affine=False)


def voxel(value, dtype=np.float32):
    def make() -> np.ndarray:
        array = octant(dtype)
        array[2, 2, 2] = value
        return array

    return make


def link_to(target: str):
    def write(folder: Path) -> Path:
        (folder / "a.nii").symlink_to(target)
        return folder / "a.nii"

    return write


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.nii.gz")
    return folder / "a.nii.gz"


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.nii.gz", "w") as file:
        file.writestr("a.nii", raw())
    return folder / "a.nii.gz"


def locked(path: Path) -> None:
    path.chmod(0)


def turned(array_axes: str, kind=nib.Nifti1Image, name="a.nii.gz"):
    return lambda folder: nifti(folder / name, *in_axes(array_axes), kind=kind)


def spm(folder: Path) -> Path:
    array, affine = in_axes("LAS")
    nib.save(nib.Spm2AnalyzeImage(array, affine), folder / "a.img")
    return folder / "a.hdr"


def extended(folder: Path) -> Path:
    image = nib.Nifti1Image(octant(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nib.save(image, folder / "a.nii.gz")
    return folder / "a.nii.gz"


KINDS = {
    # NIfTI as tools write it
    "nii": (by_nifti(), PACKED),
    "nii.gz": (by_nifti("a.nii.gz"), PACKED),
    "NIfTI-2": (by_nifti(kind=nib.Nifti2Image), PACKED),
    "upper case": (then(by_nifti("a.nii.gz"), lambda p: p.rename(p.with_name("A.NII.GZ"))), PACKED),
    "axes PIL": (turned("PIL"), PACKED),
    "axes LPS": (turned("LPS"), PACKED),
    "axes SRA": (turned("SRA", nib.Nifti2Image), PACKED),
    "uint8": (by_nifti(array=lambda: octant(np.uint8)), PACKED),
    "uint16": (by_nifti(array=lambda: octant(np.uint16)), PACKED),
    "int32": (by_nifti(array=lambda: octant(np.int32)), PACKED),
    "float32": (by_nifti(array=lambda: octant(np.float32)), PACKED),
    "float64": (by_nifti(array=lambda: octant(np.float64)), PACKED),
    "big-endian": (
        lambda f: nifti(
            f / "a.nii",
            kind=lambda a, m: nib.Nifti1Image(
                a.astype(">i2"),
                m,
                nib.Nifti1Header(endianness=">", binaryblock=nib.Nifti1Header(endianness=">").binaryblock),
            ),
        ),
        PACKED,
    ),  # fmt: skip
    "NaN": (by_nifti(array=voxel(np.nan)), PACKED),
    "infinite": (by_nifti(array=voxel(np.inf)), PACKED),
    "slope 0": (by_nifti(scl_slope=0), PACKED),
    "slope NaN": (by_nifti(scl_slope=np.nan), PACKED),
    "slope and intercept": (by_nifti(scl_slope=0.5, scl_inter=-20), PACKED),
    "one frame": (by_nifti(array=lambda: octant()[..., None]), PACKED),
    "one frame of one": (by_nifti(array=lambda: octant()[..., None, None]), PACKED),
    "negative pixdim": (by_nifti(pixdim=[-1, *-SPACING_MM, 0, 0, 0, 0]), PACKED),
    "no pixdim": (by_nifti(pixdim=[1, 0, 0, 0, 0, 0, 0, 0]), PACKED),
    "no vox_offset": (by_nifti(vox_offset=0), PACKED),
    "extension": (extended, PACKED),
    "padded": (of_bytes("a.nii", lambda data: data + bytes(400)), PACKED),
    "gzip of members": (of_bytes("a.nii.gz", lambda d: gzip.compress(d[:3000]) + gzip.compress(d[3000:])), PACKED),
    "gzip named nii": (of_bytes("a.nii", gzip.compress), PACKED),
    "plain named gz": (of_bytes("a.nii.gz", bytes), PACKED),
    "link": (then(by_nifti(), lambda p: link_to(p.rename(p.with_name("b.nii")).name)(p.parent)), PACKED),
    # pairs and Analyze
    "pair by hdr": (pair, PACKED),
    "pair by img": (then(pair, lambda p: p.with_suffix(".img")), PACKED),
    "packed pair": (packed_pair, PACKED),
    "Analyze": (lambda f: pair(f, kind=nib.AnalyzeImage, axes="LAS", orient=0, affine=False), PACKED),
    "Analyze sagittal": (lambda f: pair(f, kind=nib.AnalyzeImage, axes="ASL", orient=2, affine=False), PACKED),
    "SPM with .mat": (spm, PACKED),
    "OASIS-1 raw": (in_folder_of("OAS1_0001_MR1/RAW", "OAS1_0001_MR1_mpr-1_anon", "ASL", 0), PACKED),
    "OASIS-1 average": (in_folder_of("SUBJ_111", "OAS1_0001_MR1_mpr_n4_anon_sbj_111", "ASL", 0), PACKED),
    "OASIS-1 atlas": (in_folder_of("T88_111", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc", "LAS", 2), PACKED),
    "OASIS-2 raw": (in_folder_of("OAS2_0001_MR1/RAW", "mpr-1.nifti", "ASL", 0), PACKED),
    # names
    "not ASCII": (by_nifti("größe 脑.nii.gz"), PACKED),
    "comma": (by_nifti("a, b.nii.gz"), PACKED),
    "new line": (by_nifti("a\nb.nii.gz"), PACKED),
    # DICOM
    "DICOM": (series(), PACKED),
    "DICOM, shuffled names": (series(name=lambda n: f"IM{n * 7 % 22:03d}"), PACKED),
    "DICOM, 8 bits": (series(array=octant(np.uint8)), PACKED),
    "DICOM, unsigned": (series(array=octant(np.uint16)), PACKED),
    "DICOM, slopes": (series(rescaled), PACKED),
    "DICOM and notes": (then(series(), lambda p: (p / "notes.txt").write_text("x") and None), PACKED),
    # what is no image
    "missing": (lambda f: f / "a.nii.gz", "No such file"),
    "Windows path": (lambda f: Path("C:\\scans\\a.nii.gz"), "No such file"),
    "empty": (of_bytes("a.nii", lambda data: b""), "empty file"),
    "empty gz": (of_bytes("a.nii.gz", lambda data: gzip.compress(b"")), "empty file"),
    "text": (of_bytes("a.nii", lambda data: b"subject,age\n" * 100), "neither NIfTI nor Analyze"),
    "gzip of text": (
        of_bytes("a.nii.gz", lambda d: gzip.compress(b"subject,age\n" * 100)),
        "neither NIfTI nor Analyze",
    ),
    "zip": (zipped, "neither NIfTI nor Analyze"),
    "mgz": (of_bytes("a.mgz", gzip.compress), "expected a name ending in .nii, .nii.gz"),
    "MINC": (of_bytes("a.mnc", lambda data: b"CDF\1" + data), "expected a name ending in"),
    "NRRD": (of_bytes("a.nrrd", lambda data: b"NRRD0004\n" + data), "expected a name ending in"),
    "DICOM file": (then(series(), lambda p: p / "003.dcm"), "give the folder that holds the series"),
    "pipe": (pipe, "a device or a pipe"),
    "device": (lambda f: Path("/dev/zero"), "a device or a pipe"),
    "link to a device": (link_to("/dev/zero"), "a device or a pipe"),
    "link loop": (link_to("a.nii"), "Too many levels of symbolic links"),
    "dangling link": (link_to("nowhere"), "No such file"),
    "not allowed": (then(by_nifti(), locked), "Permission denied"),
    # damaged
    "cut short": (of_bytes("a.nii", lambda data: data[:-100]), "truncated"),
    "cut in the header": (of_bytes("a.nii", lambda data: data[:200]), "truncated: 200 of 348 header bytes"),
    "gzip cut short": (of_bytes("a.nii.gz", lambda data: gzip.compress(data)[:5000]), "damaged gzip"),
    "gzip checksum": (of_bytes("a.nii.gz", lambda d: changed(gzip.compress(d), -6, 1)), "damaged gzip"),
    "gzip size": (of_bytes("a.nii.gz", lambda d: changed(gzip.compress(d), -2, 1)), "damaged gzip"),
    "gzip and garbage": (of_bytes("a.nii.gz", lambda d: gzip.compress(d) + b"garbage"), "damaged gzip"),
    "gzip bomb": (of_bytes("a.nii.gz", lambda d: gzip.compress(d + bytes(2**27), 1)), "by the header's shape"),
    "more voxels than shape": (of_bytes("a.nii", lambda data: data + bytes(40000)), "by the header's shape"),
    "header alone": (then(pair, lambda p: p.with_suffix(".img").unlink()), "voxel file a.img is missing"),
    "voxels alone": (then(pair, lambda p: (p.unlink(), p.with_suffix(".img"))[1]), "header a.hdr is missing"),
    "pair swapped": (then(pair, swapped_pair), "neither NIfTI nor Analyze"),
    "half a mark": (then(pair, lambda p: patched(p, magic=b"nj1")), "magic bytes"),
    "no mark": (by_nifti(magic=b""), "magic bytes"),
    "Analyze orient": (lambda f: pair(f, kind=nib.AnalyzeImage, axes="LAS", orient=77, affine=False), "orient code 77"),
    # headers that are no head, or no volume
    "two axes": (by_nifti(array=lambda: octant()[0]), "not one 3-D volume"),
    "two frames": (by_nifti(array=lambda: np.stack([octant()] * 2, -1)), "not one 3-D volume"),
    "30,000 cubed": (by_nifti(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "is not within"),
    "gzip of 30,000 cubed": (by_nifti("a.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "is not within"),
    "gigabytes missing": (
        by_nifti(
            "a.nii.gz",
            dim=[3, 600, 600, 600, 1, 1, 1, 1],
            pixdim=[1, 0, 0, 0, 0, 0, 0, 0],
            srow_x=[0.3, 0, 0, 0],
            srow_y=[0, 0.3, 0, 0],
            srow_z=[0, 0, 0.3, 0],
        ),
        "truncated",
    ),  # fmt: skip
    "no length": (by_nifti(dim=[3, 22, 0, 20, 1, 1, 1, 1]), "is not within"),
    "negative length": (by_nifti(dim=[3, -22, 26, 20, 1, 1, 1, 1]), "is not within"),
    "no axes": (by_nifti(dim=[0, 22, 26, 20, 1, 1, 1, 1]), "dim[0]"),
    "many axes": (by_nifti(dim=[1000, 22, 26, 20, 1, 1, 1, 1]), "dim[0]"),
    "tiny": (by_nifti(array=lambda: octant()[:8, :8, :8]), "is not within"),
    "complex": (by_nifti(array=lambda: octant(np.complex64)), "not a real number"),
    "colour": (by_nifti(array=lambda: np.zeros((22, 26, 20), [(c, "u1") for c in "RGB"])), "not a real number"),
    "float128": (by_nifti(datatype=1536, bitpix=128), "datatype 1536"),
    "unknown type": (by_nifti(datatype=99), "99"),
    "bits": (by_nifti(bitpix=8), "bitpix"),
    "all NaN": (by_nifti(array=lambda: np.full((22, 26, 20), np.nan, np.float32)), "constant image"),
    "constant": (by_nifti(array=lambda: np.full((22, 26, 20), 7, np.int16)), "constant image"),
    "nearly constant": (
        by_nifti(array=lambda: np.where(np.arange(11440) == 5, 8, 7).reshape(22, 26, 20).astype("i2")),
        "constant image",
    ),
    "infinite slope": (by_nifti(scl_slope=np.inf), "scl_slope"),
    "singular affine": (by_nifti(srow_x=[3, 3.2, 0, 0], srow_y=[0, 0, 0, 0]), "singular"),
    "NaN affine": (by_nifti(srow_x=[np.nan, 0, 0, 0]), "no finite voxel size"),
    "no orientation": (by_nifti(sform_code=0, qform_code=0), "nor which side is left"),
    "microns": (by_nifti(xyzt_units=3), "microns"),
    "sizes in microns": (by_nifti(srow_x=[3000, 0, 0, 0], pixdim=[1, 0, 0, 0, 0, 0, 0, 0]), "is the voxel size right"),
    "metres": (by_nifti(affine=np.diag([0.003, 0.003, 0.003, 1]), xyzt_units=1), "metres"),
    "sizes in metres": (by_nifti(affine=np.diag([0.003, 0.003, 0.003, 1])), "is the voxel size right"),
    "voxel size twice": (by_nifti(pixdim=[1, 3, 3.2, 3.0, 0, 0, 0, 0]), "in pixdim and"),
    "thick slices": (by_nifti(affine=np.diag([3.0, 3.2, 5, 1])), "slice gap of 5 mm"),
    # folders
    "folder": (lambda f: (f / "sub").mkdir() or f, "folder without DICOM files"),
    "several series": (then(series(), two_series), "holds 2 series ('T1' with 22 images, 'scout' with 5 images)"),
    "missing slice": (then(series(), lambda p: (p / "009.dcm").unlink()), "1 slice missing: 6 mm between"),
    "irregular": (series(with_tag("ImagePositionPatient", lambda n: [n * 3 + n * n / 20, 0, 0])), "not evenly spaced"),
    "position twice": (then(series(), lambda p: shutil.copy(p / "003.dcm", p / "x.dcm") and None), "at one position"),
    "localizer": (series(with_tag("ImageOrientationPatient", lambda n: THREE_WAYS[n % 3])), "3 orientations"),
    "mixed sizes": (then(series(), other_size), "slices differ in size"),
    "DICOM, thick slices": (series(spacing_mm=6), "slice gap of 6 mm"),
    "DICOM, inverted": (series(with_tag("PhotometricInterpretation", lambda n: "MONOCHROME1")), "MONOCHROME1"),
    "DICOM cut short": (
        then(series(), lambda p: (p / "005.dcm").write_bytes((p / "005.dcm").read_bytes()[:-50]) and None),
        "005.dcm cannot be read",
    ),
}
if os.geteuid() == 0:
    del KINDS["not allowed"]  # root may read everything


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odd")
    paths = {}
    for number, (kind, (make, _)) in enumerate(KINDS.items()):
        (folder / f"{number:03d}").mkdir()
        paths[kind] = make(folder / f"{number:03d}")
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_prepared_right_or_refused_with_its_reason(corpus, kind):
    expected = KINDS[kind][1]
    if expected is PACKED:
        assert is_octant(prepare(corpus[kind], RECIPE).volume_XYZ)
    else:
        with pytest.raises(ValueError) as refused:
            prepare(corpus[kind], RECIPE)
        assert str(refused.value).startswith(f"{corpus[kind]}: ")
        assert expected in str(refused.value)


def test_one_build_packs_the_good_and_names_the_reason_of_the_rest(corpus, tmp_path):
    """By the command a user types: nothing crashes or hangs, and no process takes more than 2 GB."""
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["scan_id", "image"], *([kind, path] for kind, path in corpus.items())])
    build = subprocess.Popen(
        [sys.executable, "-m", "sharding.build", "--manifest", tmp_path / "manifest.csv", "--out", tmp_path / "out",
         "--size", "32", "--spacing-mm", "6", "--max-rejected", "1", "--workers", "1", "--codec", "raw"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(tmp_path / "log", "w"), start_new_session=True,
    )  # fmt: skip
    largest = watch(build)
    log = (tmp_path / "log").read_text()
    assert build.returncode == 0, log
    assert largest < MAX_RSS_BYTES, f"a process took {largest / 2**20:.0f} MiB"

    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        rejected = {row["scan"]: row["reason"] for row in csv.DictReader(file)}
    with open(tmp_path / "out" / "split.csv", newline="") as file:
        packed = [row["scan_id"] for row in csv.DictReader(file)]
    assert len(packed) + len(rejected) == len(KINDS)
    assert sorted(packed) == sorted(kind for kind, (_, reason) in KINDS.items() if reason is PACKED)
    wrong = {kind: reason for kind, reason in rejected.items() if KINDS[kind][1] not in reason}
    assert not wrong
    volumes = list(packed_volumes(tmp_path / "out"))
    assert len(volumes) == len(packed) and all(map(is_octant, volumes))
    assert f"packed {len(packed)}, set aside {len(rejected)}" in log


def packed_volumes(out: Path) -> Iterator[np.ndarray]:
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    voxels = tar.extractfile(f"{record['key']}.vol").read()
                    yield np.frombuffer(voxels, np.uint8).reshape(record["shape"])


def watch(process: subprocess.Popen) -> int:
    """Waits for a process; returns the most memory that it or one of its children had at a time."""
    largest, until = 0, time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getsid(int(status.parent.name)) == process.pid:
                    peak = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
                    largest = max([largest, *(int(line.split()[1]) * 1024 for line in peak)])
            except OSError:
                pass  # it has just ended
        if time.monotonic() > until:
            os.killpg(process.pid, 9)
            pytest.fail(f"no end after {TIMEOUT_S} s")
        time.sleep(0.1)
    return largest
