import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medblip.volume import Recipe, place, prepare, prepare_array, read_image, reference_resize, voxel_file

REAL = Path(os.environ.get("MEDBLIP_REAL_DATA", Path(__file__).parents[1] / ".." / "shared" / "real"))
STANDARD = Recipe(name="standard", size=96, spacing_mm=2.5)
REFERENCE = Recipe(name="reference", size=64)


def wave(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The input of the published numbers: a sum of two sines over the C-order index."""
    n = np.arange(np.prod(shape), dtype=np.float64)
    return (np.sin(0.7310585 * n + 1.6180339 * seed) + 0.5 * np.cos(0.1234567 * n * (seed + 1))).reshape(shape)


def head(
    shape_mm=(170, 210, 230), spacing_mm=2.0, air=0.0, noise=0.0, rician=0.0, neck=True, above_mm=12, seed=0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An ellipsoid head (150 x 190 x 150 mm, top `above_mm` below the image's) over a neck; image, affine and brain."""
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    shape = tuple(np.rint(np.array(shape_mm) / spacing).astype(int))
    x, y, z = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    x, y, z = x - shape_mm[0] / 2, y - shape_mm[1] / 2, z - (shape_mm[2] - above_mm - 75)
    radius = np.sqrt((x / 75) ** 2 + (y / 95) ** 2 + (z / 75) ** 2)
    random = np.random.default_rng(seed)
    image = np.full(shape, float(air))
    if neck:
        image[(np.hypot(x, y) < 55) & (z < 0)] = 500
    image[radius < 1] = 700
    brain = radius < 0.85
    image[brain] = 400 + 300 * np.cos(x[brain] / 9) * np.cos(y[brain] / 11)
    image += noise * np.abs(random.standard_normal(shape))
    if rician:
        image = np.hypot(image + rician * random.standard_normal(shape), rician * random.standard_normal(shape))
    return image.astype(np.float32), np.diag([*spacing, 1.0]), brain


def save(path: Path, array: np.ndarray, affine=None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([3.0, 3, 3, 1]) if affine is None else affine), path)
    return path


def small(seed=0, shape=(20, 24, 18)) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


@pytest.mark.parametrize(
    ("shape", "seed", "size", "new", "pad", "total"),
    [
        ((256, 256, 166), 2, 224, (224, 224, 145), (0, 0, 39), 3637759.768),
        ((5, 7, 3), 3, 14, (10, 14, 6), (2, 0, 4), 410.040266),
    ],
)
def test_reference_resize_gives_the_published_numbers(shape, seed, size, new, pad, total):
    volume, begin = reference_resize(torch.from_numpy(wave(shape, seed)).float(), size)
    assert tuple(volume.shape) == new
    assert begin == pad
    assert volume.double().sum().item() == pytest.approx(total, rel=1e-7)
    if size == 14:
        centre = volume[tuple(7 - p for p in pad)].item()
        assert centre == pytest.approx(0.494484279, abs=1e-6)


def test_reference_is_the_published_load_to_half_a_step():
    array = wave((60, 48, 40), 0).astype(np.float32) * 900
    scaled = torch.from_numpy((array - array.min()) / (array.max() - array.min()))[None, None]
    expected = torch.nn.functional.interpolate(scaled, (64, 51, 42), mode="trilinear", align_corners=True)[0, 0]
    prepared = prepare_array(array, np.diag([1.2, 0.9, 1.1, 1.0]), REFERENCE)
    assert prepared.pad_before == (0, 6, 11)
    assert np.abs(prepared.volume_XYZ / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-4
    assert (prepared.intensity_low, prepared.intensity_high) == (array.min(), array.max())
    corner = prepared.affine @ [63, 50, 41, 1]
    np.testing.assert_allclose(corner[:3], [59 * 1.2, 47 * 0.9, 39 * 1.1])


@pytest.mark.parametrize("recipe", [STANDARD, REFERENCE])
def test_left_stays_left_whatever_the_axis_order(recipe):
    """One anatomy stored in all 48 ways: every one gives the same volume and world positions.

    Voxels are resampled in the file's order, so float32 rounds differently here and there, by one grey level.
    """
    array, affine, _ = head(shape_mm=(160, 200, 190), spacing_mm=(4, 4.8, 4.8))
    array[3:8, 15:22, 20:25] = 1500  # on the subject's left: low x in RAS+
    expected = prepare_array(array, affine, recipe)
    brightest = np.argwhere(expected.volume_XYZ == 255).mean(axis=0)
    assert brightest[0] < expected.volume_XYZ.shape[0] / 3
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            orientation = np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
            stored = nib.apply_orientation(array, orientation)
            stored_affine = affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)
            prepared = prepare_array(stored, stored_affine, recipe)
            difference = np.abs(prepared.volume_XYZ.astype(int) - expected.volume_XYZ)
            assert difference.max() <= 1 and difference.mean() < 1e-4
            np.testing.assert_allclose(prepared.affine, expected.affine, atol=1e-6)


def test_burned_in_letters_are_on_their_sides():
    path = REAL / "air.hdr"
    if not path.exists():
        pytest.skip(f"needs the real image {path} (or MEDBLIP_REAL_DATA)")
    for recipe in (Recipe("standard", 224, 1.0), Recipe("reference", 224)):
        prepared = prepare(path, recipe)
        grid = place(prepared.volume_XYZ, prepared.pad_before, 224)
        letters = (grid >= 254).sum(axis=2)  # seen from above, x to the subject's right
        left, right = letters[:112] > 60, letters[112:] > 60
        # An L fills one stroke to its front and a foot to the back; an R is mirror-unlike it and has more ink.
        assert right.sum() > left.sum() * 1.2
        foot = np.argwhere(left)[:, 1].min()
        stroke = np.argwhere(left[:, foot + left.any(axis=0).sum() // 2])[:, 0]
        assert stroke.max() < np.argwhere(left[:, foot + 2])[:, 0].max() - 10


def in_axes(array: np.ndarray, axes: str) -> np.ndarray:
    """A RAS+ array as it is stored with other axes."""
    axes = nib.orientations.axcodes2ornt(tuple(axes))
    return nib.apply_orientation(array, nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), axes))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon", "ASL"),
        ("SUBJ_111/OAS1_0001_MR1_mpr_n4_anon_sbj_111", "ASL"),
        ("T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc", "LAS"),
        ("T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc", "LAS"),
        ("OAS2_0001_MR1/RAW/mpr-1.nifti", "ASL"),
    ],
)
@pytest.mark.parametrize("orient", [0, 2, 32])
def test_oasis_axes_are_known_by_the_name_whatever_the_header_says(tmp_path, name, axes, orient):
    image = nib.AnalyzeImage(in_axes(small(), axes)[..., None], None)
    image.header.set_zooms((3, 3, 3, 0))
    image.header["orient"] = bytes([orient])
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    nib.save(image, path.with_name(path.name + ".img"))
    array, affine = read_image(path.with_name(path.name + ".hdr"))
    np.testing.assert_array_equal(array, small())
    np.testing.assert_allclose(affine[:3, :3], np.diag([3, 3, 3]), atol=1e-6)


def test_analyze_axes_follow_the_orient_byte(tmp_path):
    array = small(shape=(20, 24, 18))
    pictures = {}
    for orient, axes in {0: "LAS", 1: "LSA", 2: "ASL"}.items():
        image = nib.AnalyzeImage(in_axes(array, axes), None)
        image.header.set_zooms((3, 3, 3))
        image.header["orient"] = bytes([orient])
        nib.save(image, tmp_path / f"{axes}.img")
        pictures[axes], affine = read_image(tmp_path / f"{axes}.hdr")
        assert nib.aff2axcodes(affine) == ("R", "A", "S")
    for picture in pictures.values():
        np.testing.assert_array_equal(picture, array)


def test_standard_voxels_lie_where_the_affine_says():
    """A rotated, anisotropic image whose intensity is linear in world position stays exactly that."""
    angle = np.deg2rad(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2.1, 1.7, 2.9])
    affine[:3, 3] = [-80, -95, -60]
    gradient = np.array([0.9, 0.5, 0.7])
    index = np.stack(np.meshgrid(np.arange(80), np.arange(110), np.arange(60), indexing="ij"), axis=-1)
    array = (index @ affine[:3, :3].T + affine[:3, 3]) @ gradient
    for spacing_mm in (1.0, 2.5):  # finer and coarser than the image
        prepared = prepare_array(array, affine, Recipe("standard", 160, spacing_mm))
        np.testing.assert_allclose(prepared.spacing_mm, spacing_mm)
        index = np.stack(np.meshgrid(*map(np.arange, prepared.volume_XYZ.shape), indexing="ij"), axis=-1)
        world = index @ prepared.affine[:3, :3].T + prepared.affine[:3, 3]
        low, high = prepared.intensity_low, prepared.intensity_high
        expected = np.clip((world @ gradient - low) / (high - low), 0, 1) * 255
        assert np.abs(prepared.volume_XYZ - expected).max() <= 0.501


def test_an_image_on_the_grid_is_copied_not_blurred():
    array, affine, _ = head(spacing_mm=2.0)
    prepared = prepare_array(array, affine, Recipe("standard", 112, 2.0))
    offset = np.rint(np.linalg.inv(affine) @ prepared.affine)[:3, 3].astype(int)
    source = array[tuple(slice(o, o + n) for o, n in zip(offset, prepared.volume_XYZ.shape, strict=True))]
    scaled = (source - prepared.intensity_low) / (prepared.intensity_high - prepared.intensity_low)
    np.testing.assert_array_equal(prepared.volume_XYZ, np.rint(np.clip(scaled * 255, 0, 255)))


CASES = {
    "full head with neck": dict(),
    "noisy air": dict(air=20, noise=60),
    "anisotropic": dict(spacing_mm=(1.2, 2.0, 4.9)),
    "no neck": dict(neck=False, shape_mm=(160, 200, 170)),
    "already cropped": dict(shape_mm=(150, 190, 174)),
    "Rician noise": dict(rician=90),
    "Rician noise and a wide field of view": dict(rician=90, shape_mm=(300, 300, 300)),
    "cropped, the head touches every border": dict(neck=False, shape_mm=(140, 180, 140), above_mm=-5),
    "wide field of view": dict(shape_mm=(340, 340, 300), spacing_mm=(3, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_brain_is_inside_the_grid_and_the_head_hangs_from_its_top(case):
    array, affine, brain = head(**CASES[case])
    prepared = prepare_array(array, affine, STANDARD)
    to_grid = np.linalg.inv(prepared.affine) @ affine
    corners = np.argwhere(brain) @ to_grid[:3, :3].T + to_grid[:3, 3]
    assert (corners.min(axis=0) > -0.5).all()
    assert (corners.max(axis=0) < np.array(prepared.volume_XYZ.shape) - 0.5).all()

    grid_corners = corners + prepared.pad_before
    middle = (grid_corners.min(axis=0) + grid_corners.max(axis=0)) / 2
    np.testing.assert_allclose(middle[:2] * 2.5, 47.5 * 2.5, atol=6)
    brain_top_mm = (95.5 - grid_corners[:, 2].max()) * 2.5
    skull_mm = 0.15 * 75
    assert 10 + skull_mm - 6 < brain_top_mm < 10 + skull_mm + 6


def test_a_stripped_brain_is_found_and_its_background_is_zero():
    array, affine, brain = head(neck=False)
    array[~brain] = 0
    prepared = prepare_array(array, affine, STANDARD)
    grid = place(prepared.volume_XYZ, prepared.pad_before, 96)
    assert (grid > 20).sum() * 2.5**3 == pytest.approx(brain.sum() * 2.0**3, rel=0.1)
    assert grid[:, :, -3:].max() == 0
    assert grid[:, :, -7].max() > 0


def test_a_neck_is_cut_and_does_not_move_the_head():
    shoulders, affine, brain = head(shape_mm=(380, 260, 400), spacing_mm=(4, 4, 4))
    shoulders[:, :, :30] = 550  # 120 mm of body as wide as the image
    prepared = prepare_array(shoulders, affine, STANDARD)
    to_grid = np.linalg.inv(prepared.affine) @ affine
    corners = np.argwhere(brain) @ to_grid[:3, :3].T + to_grid[:3, 3] + prepared.pad_before
    np.testing.assert_allclose((corners.min(axis=0) + corners.max(axis=0))[:2] / 2 * 2.5, 47.5 * 2.5, atol=6)
    assert (95.5 - corners[:, 2].max()) * 2.5 < 10 + 0.15 * 75 + 6
    assert prepared.pad_before[2] == 0  # there is body below the grid


def test_a_bright_speck_in_the_air_changes_nothing():
    array, affine, _ = head()
    expected = prepare_array(array, affine, STANDARD)
    array[2:5, 2:5, -4:-1] = 5000
    np.testing.assert_array_equal(
        prepare_array(array, affine, STANDARD).volume_XYZ[20:-20, 20:-20, :60],
        expected.volume_XYZ[20:-20, 20:-20, :60],
    )


def test_coarse_grids_average_what_lies_between_their_voxels():
    random = np.random.default_rng(0)
    array, affine, _ = head()
    noisy = array + 200 * random.standard_normal(array.shape).astype(np.float32)
    roughness = []
    for antialias_below in (0.67, 0.0):
        prepared = prepare_array(noisy, affine, Recipe("standard", 40, 6.0, antialias_below=antialias_below))
        scale = (prepared.intensity_high - prepared.intensity_low) / 255
        roughness.append(np.diff(prepared.volume_XYZ[8:20, 8:25, 20:30] * scale, axis=0).std())
    assert roughness[0] < 0.5 * roughness[1]


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(small(), np.diag([3.0, 3, 3, 1]))
    image.header.set_slope_inter(0.5, -20)
    nib.save(image, tmp_path / "scaled.nii.gz")
    stored = nib.load(tmp_path / "scaled.nii.gz")
    array, _ = read_image(tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(array, stored.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "big-endian.nii", "a.nii2"])
def test_every_format_gives_the_same_voxels(tmp_path, name):
    array, affine = small(), np.diag([3.0, 3, 3, 1])
    path = tmp_path / name.replace("nii2", "nii")
    if name == "a.nii2":
        nib.save(nib.Nifti2Image(array, affine), path)
    elif name == "a.img":
        nib.save(nib.Nifti1Pair(array, affine), path)
        path = path.with_suffix(".hdr")
    elif name == "big-endian.nii":
        header = nib.Nifti1Header(endianness=">")
        header.set_data_dtype(np.int16)
        nib.save(nib.Nifti1Image(array.astype(">i2"), affine, header), path)
    else:
        save(path, array)
    np.testing.assert_array_equal(read_image(path)[0], array)


def test_gzip_of_several_members_is_read(tmp_path):
    data = save(tmp_path / "a.nii", small()).read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    np.testing.assert_array_equal(read_image(tmp_path / "two.nii.gz")[0], small())


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
    assert read_image(save(tmp_path / "a.nii", small()[..., None, None]))[0].shape == (20, 24, 18)


def test_nan_and_infinity_are_background(tmp_path):
    array = small().astype(np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    read, _ = read_image(save(tmp_path / "a.nii", array))
    assert read[0, 0, 0] == read[1, 1, 1] == read.min() == np.nanmin(array)


def _bad_gzip(path: Path, change) -> Path:
    data = bytearray(save(path, small()).read_bytes())
    path.write_bytes(change(data))
    return path


def _flip_checksum(data: bytearray) -> bytes:
    data[-6] ^= 1
    return bytes(data)


def _with_header(path: Path, **fields) -> Path:
    header = nib.Nifti1Header()
    header.set_data_shape((20, 24, 18))
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([3.0, 3, 3, 1]), 1)
    header.set_zooms((3, 3, 3))
    header["magic"], header["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + b"\0" * 4 + small().tobytes())
    return path


BAD = {
    "frames": lambda p: save(p / "a.nii", np.stack([small()] * 3, -1)),
    "one slice": lambda p: save(p / "a.nii", small(shape=(200, 200, 1))),
    "no orientation": lambda p: _with_header(p / "a.nii", sform_code=0),
    "unknown code": lambda p: _with_header(p / "a.nii", sform_code=64),
    "microns": lambda p: _with_header(p / "a.nii", xyzt_units=3),
    "metres": lambda p: _with_header(p / "a.nii", xyzt_units=1),
    "voxel size twice": lambda p: _with_header(p / "a.nii", pixdim=[1, 3, 3, 3.1, 0, 0, 0, 0]),
    "bits": lambda p: _with_header(p / "a.nii", bitpix=8),
    "slope": lambda p: _with_header(p / "a.nii", scl_slope=np.inf),
    "slope down": lambda p: _with_header(p / "a.nii", scl_slope=-1),
    "offset": lambda p: _with_header(p / "a.nii", vox_offset=348),
    "slice left out": lambda p: _with_header(p / "a.nii", dim=[3, 20, 24, 17, 1, 1, 1, 1]),
    "slices apart": lambda p: save(p / "a.nii", small(), np.diag([3.0, 3, 5, 1])),
    "half a mark": lambda p: _with_header(p / "a.nii", magic=b"n\0001"),
    "gzip of more": lambda p: (p / "a.nii.gz", (p / "a.nii.gz").write_bytes(gzip.compress(_bomb(p), 1)))[0],
    "two axes": lambda p: save(p / "a.nii", small(shape=(200, 200))),
    "few voxels": lambda p: save(p / "a.nii", small(shape=(20, 20, 15))),
    "few millimetres": lambda p: save(p / "a.nii", small(), np.diag([1.0, 1, 1, 1])),
    "many metres": lambda p: save(p / "a.nii", small(), np.diag([3000.0, 3000, 3000, 1])),
    "constant": lambda p: save(p / "a.nii", np.full((20, 20, 20), 7, np.int16)),
    "all NaN": lambda p: save(p / "a.nii", np.full((20, 20, 20), np.nan, np.float32)),
    "complex": lambda p: save(p / "a.nii", small().astype(np.complex64)),
    "colour": lambda p: save(p / "a.nii", np.zeros((20, 20, 20), dtype=[(c, "u1") for c in "RGB"])),
    "singular affine": lambda p: _with_header(p / "a.nii", srow_y=[3, 0, 0, 0]),
    "zero affine": lambda p: _with_header(p / "a.nii", srow_x=0, srow_y=0, srow_z=0),
    "NaN affine": lambda p: _with_header(p / "a.nii", srow_x=[np.nan, 0, 0, 0]),
    "absurd size": lambda p: _with_header(p / "a.nii", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
    "absurd total": lambda p: _with_header(p / "a.nii", dim=[3, 2000, 2000, 2000, 1, 1, 1, 1], srow_x=[0.1, 0, 0, 0]),
    "negative size": lambda p: _with_header(p / "a.nii", dim=[3, -20, 24, 18, 1, 1, 1, 1]),
    "truncated": lambda p: _bad_gzip(p / "a.nii", lambda data: data[:-100]),
    "truncated gzip": lambda p: _bad_gzip(p / "a.nii.gz", lambda data: data[: len(data) // 2]),
    "gzip without its end": lambda p: _bad_gzip(p / "a.nii.gz", lambda data: data[:-3]),
    "gzip checksum": lambda p: _bad_gzip(p / "a.nii.gz", _flip_checksum),
    "empty": lambda p: _bad_gzip(p / "a.nii.gz", lambda data: b""),
    "garbage": lambda p: _bad_gzip(p / "a.nii", lambda data: b"not an image " * 100),
    "header without voxels": lambda p: _lonely_header(p),
    "missing": lambda p: p / "a.nii",
    "folder": lambda p: p,
    "other format": lambda p: _bad_gzip(p / "a.nii", lambda d: d).rename(p / "a.png"),
}


def _bomb(folder: Path) -> bytes:
    return save(folder / "b.nii", small()).read_bytes() + bytes(2**24)


def _lonely_header(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(small(), np.diag([3.0, 3, 3, 1])), folder / "a.img")
    (folder / "a.img").unlink()
    return folder / "a.hdr"


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path, fault):
    path = BAD[fault](tmp_path)
    with pytest.raises(ValueError, match="^" + str(path).replace(".", r"\.") + ": .+"):
        prepare(path, STANDARD)


def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path):
    import tracemalloc

    plane = dict(dim=[3, 2048, 2048, 60, 1, 1, 1, 1], srow_x=[0.1, 0, 0, 0], pixdim=[1, 0.1, 3, 3, 0, 0, 0, 0])
    absurd = [_with_header(tmp_path / "a.nii", **plane), tmp_path / "a.nii.gz", tmp_path / "bomb.nii.gz"]
    absurd[1].write_bytes(gzip.compress(absurd[0].read_bytes()))
    absurd[2].write_bytes(gzip.compress(save(tmp_path / "b.nii", small()).read_bytes() + bytes(2**26)))
    for path in absurd:
        tracemalloc.start()
        with pytest.raises(ValueError):
            prepare(path, STANDARD)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


def test_a_pair_is_read_by_either_name_packed_or_not(tmp_path):
    nib.save(nib.Nifti1Pair(small(), np.diag([3.0, 3, 3, 1])), tmp_path / "a.img")
    for name in ("a.hdr", "a.img"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for given in ("a.hdr", "a.img", "a.hdr.gz", "a.img.gz"):
        np.testing.assert_array_equal(read_image(tmp_path / given)[0], small())
    assert voxel_file(tmp_path / "a.hdr") == tmp_path / "a.img"
    (tmp_path / "a.img").unlink()
    assert voxel_file(tmp_path / "a.hdr") == tmp_path / "a.img.gz"
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr")[0], small())


def test_the_sform_counts_before_the_qform(tmp_path):
    image = nib.Nifti1Image(small(), None)
    turned = np.array([[0, -3.0, 0, 0], [3, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    for codes, expected in (((1, 2), np.diag([-3.0, -3, 3, 1])), ((1, 0), turned)):
        image.set_qform(turned, codes[0])
        image.set_sform(np.diag([-3.0, -3, 3, 1]), codes[1])
        nib.save(image, tmp_path / "a.nii")
        array, _ = read_image(tmp_path / "a.nii")
        orientation = nib.io_orientation(expected)
        np.testing.assert_array_equal(array, nib.apply_orientation(small(), orientation))


MASKED = Recipe("standard", 96, 2.5, brain_mask=True)


@pytest.mark.parametrize("recipe", [MASKED, Recipe("reference", 64, brain_mask=True)])
def test_a_mask_leaves_the_brain_alone(tmp_path, recipe):
    """All outside is 0, and what lies outside has no say in the grid or the intensities."""
    array, affine, brain = head()
    mask = save(tmp_path / "mask.nii.gz", brain.astype(np.uint8), affine)
    prepared = []
    for outside in (1, 20):
        image = np.where(brain, array, array * outside)
        prepared.append(prepare(save(tmp_path / "a.nii", image, affine), recipe, mask))
    assert prepared[0].intensity_high == pytest.approx(prepared[1].intensity_high, rel=0.01)
    assert prepared[0].pad_before == prepared[1].pad_before
    np.testing.assert_array_equal(prepared[0].volume_XYZ == 0, prepared[1].volume_XYZ == 0)
    to_source = np.linalg.inv(affine) @ prepared[0].affine
    index = np.argwhere(prepared[0].volume_XYZ > 0) @ to_source[:3, :3].T + to_source[:3, 3]
    shrunk = np.linalg.norm((index - np.argwhere(brain).mean(axis=0)) * 2 / np.array([75, 95, 75]) / 0.85, axis=1)
    assert shrunk.max() < 1.05
    voxel_mm3 = np.prod(prepared[0].spacing_mm)
    assert len(index) * voxel_mm3 == pytest.approx(brain.sum() * 8, rel=0.1)


def test_a_mask_stored_with_other_axes_is_the_same_mask(tmp_path):
    array, affine, brain = head(spacing_mm=4.0)
    image = save(tmp_path / "a.nii", array, affine)
    orientation = np.array([[1, -1], [2, 1], [0, -1]])
    stored = nib.apply_orientation(brain.astype(np.uint8), orientation)
    stored_affine = affine @ nib.orientations.inv_ornt_aff(orientation, brain.shape)
    expected = prepare(image, MASKED, save(tmp_path / "mask.nii", brain.astype(np.uint8), affine))
    found = prepare(image, MASKED, save(tmp_path / "turned.nii", stored, stored_affine))
    np.testing.assert_array_equal(found.volume_XYZ, expected.volume_XYZ)


def test_a_mask_and_a_recipe_without_one_do_not_mix(tmp_path):
    array, affine, brain = head(spacing_mm=4.0)
    image = save(tmp_path / "a.nii", array, affine)
    mask = save(tmp_path / "mask.nii", brain.astype(np.uint8), affine)
    with pytest.raises(ValueError, match="brain_mask"):
        prepare(image, STANDARD, mask)
    with pytest.raises(ValueError, match="brain_mask"):
        prepare(image, MASKED)
    assert MASKED.id != STANDARD.id


def test_a_mask_of_another_grid_is_refused_naming_both(tmp_path):
    array, affine, brain = head(spacing_mm=4.0)
    image = save(tmp_path / "a.nii", array, affine)
    moved = affine.copy()
    moved[0, 3] += 2
    for mask in (
        save(tmp_path / "cut.nii", brain[:-1].astype(np.uint8), affine),
        save(tmp_path / "moved.nii", brain.astype(np.uint8), moved),
    ):
        with pytest.raises(ValueError, match=f"{image}: the mask lies on another grid: {mask} .*; {image}"):
            prepare(image, MASKED, mask)
    with pytest.raises(ValueError, match=f"{image}: the mask .*negative.nii is nowhere more than 0"):
        prepare(image, MASKED, save(tmp_path / "negative.nii", -brain.astype(np.int16), affine))
    with pytest.raises(ValueError, match="none.nii: constant image"):
        prepare(image, MASKED, save(tmp_path / "none.nii", np.zeros_like(brain, np.uint8), affine))


def test_recipe_survives_its_dictionary_and_its_id_tells_parameters_apart():
    for recipe in (STANDARD, REFERENCE):
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    ids = {
        STANDARD.id,
        REFERENCE.id,
        Recipe("standard", 96, 2.0).id,
        Recipe("standard", 96, 2.5, head_height_mm=160).id,
    }
    assert len(ids) == 4
    assert Recipe("standard", 96, 2.5).id == STANDARD.id


@pytest.mark.parametrize(
    ("change", "named"), [({"colour": 1}, "colour"), ({"size": None}, "size"), ({"name": "other"}, "other")]
)
def test_recipe_from_a_dictionary_names_what_is_wrong(change, named):
    values = STANDARD.to_dict() | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    "values", [("standard", 96), ("reference", 96, 1.0), ("standard", 4, 1.0), ("standard", 96, -1)]
)
def test_recipes_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError):
        Recipe(*values)


def test_place_puts_the_volume_into_the_grid():
    grid = place(np.full((2, 3, 4), 9, np.uint8), (1, 0, 2), 6)
    assert grid.shape == (6, 6, 6)
    assert grid[1:3, 0:3, 2:6].min() == 9
    assert grid.sum() == 9 * 24


@pytest.mark.parametrize(
    "name", ["chris_t1.nii.gz", "ch2.nii.gz", "mricros_stroke.nii.gz", "papaya_sample_image.nii.gz"]
)
def test_real_heads_lie_inside_the_standard_grid(name):
    path = REAL / name
    if not path.exists():
        pytest.skip(f"needs the real image {path} (or MEDBLIP_REAL_DATA)")
    prepared = prepare(path, Recipe("standard", 112, 2.0))
    grid = place(prepared.volume_XYZ, prepared.pad_before, 112) > 60
    front_view = grid.any(axis=1)
    assert front_view[:, -3:].sum() <= 3  # about 10 mm of air above the vertex
    assert front_view[:, -9].sum() > 5
    rows = np.flatnonzero(front_view.any(axis=1))
    assert abs((rows[0] + rows[-1]) / 2 - 55.5) < 4


WHOLE_HEADS = [
    "air.hdr",
    "ch2.nii.gz",
    "chris_t1.nii.gz",
    "mricros_stroke.nii.gz",
    "papaya_sample_image.nii.gz",
    "someones_anatomy.nii.gz",
    "dicom/sag_mprage",
]


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_every_real_head_lies_as_the_others_do(name):
    """Of all 48 ways to turn and mirror it, the one it has, or its left-right mirror, is most like another head."""
    if not (REAL / name).exists():
        pytest.skip(f"needs the real image {REAL / name} (or MEDBLIP_REAL_DATA)")

    def coarse(path: Path) -> np.ndarray:
        prepared = prepare(path, Recipe("standard", 112, 2.0))
        grid = place(prepared.volume_XYZ, prepared.pad_before, 112)[14:98, 14:98, 24:108]
        return grid.reshape(14, 6, 14, 6, 14, 6).mean(axis=(1, 3, 5))

    picture, other = coarse(REAL / name), coarse(REAL / ("ch2.nii.gz" if "chris" in name else "chris_t1.nii.gz"))
    likeness = {
        (order, flips): np.corrcoef(
            picture.transpose(order)[:: flips[0], :: flips[1], :: flips[2]].ravel(), other.ravel()
        )[0, 1]
        for order in itertools.permutations(range(3))
        for flips in itertools.product((1, -1), repeat=3)
    }
    order, flips = max(likeness, key=likeness.get)
    assert order == (0, 1, 2) and flips[1:] == (1, 1)
