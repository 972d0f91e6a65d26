import csv
import dataclasses
import sys

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("nilearn")

from sharding.madeup import COLUMNS, Options, draw_patient, draw_scan, load_template, render, write_madeup  # noqa: E402


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Six patients by two processes."""
    options = Options(out=tmp_path_factory.mktemp("madeup"), subjects=6, workers=2)
    write_madeup(options)
    return options


def read_manifest(folder):
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def csf_ml(patient, effect):
    """CSF inside the head, by an ideal scanner that sees nothing else."""
    scan = draw_scan(0, "MADEUP", 0, 0, "A")
    only_csf = {"gm": 0.0, "wm": 0.0, "csf": 1.0, "scalp": 0.0}
    ideal = dataclasses.replace(scan, **only_csf, gamma=1.0, bias=0 * scan.bias, noise=0.0)
    template = dataclasses.replace(load_template(), texture=np.zeros_like(load_template().texture))
    return render(template, patient, ideal, patient.age_years, effect).sum() * scan.spacing_mm.prod() / 1000


def test_same_bytes_whatever_the_workers(written, tmp_path):
    write_madeup(dataclasses.replace(written, out=tmp_path, workers=1))
    names = sorted(path.relative_to(written.out) for path in written.out.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for name in names:
        assert (written.out / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_manifest_is_complete_in_patient_order_with_relative_images(written):
    rows = read_manifest(written.out)
    assert list(rows[0]) == list(COLUMNS)
    assert [row["subject_id"] for row in rows] == [f"sub-{n:04d}" for n in range(1, 7)]
    assert sorted(row["diagnosis"] for row in rows) == ["AD", "AD", "CN", "CN", "MCI", "MCI"]
    for row in rows:
        assert (written.out / row["image"]).is_file()
        assert row["split"] == row["report"] == ""
        assert 55 <= float(row["age_years"]) <= 92 and row["sex"] in ("F", "M")


def test_images_load_as_int16_with_varying_axis_orders_shapes_and_spacings(written):
    images = [nib.load(written.out / row["image"]) for row in read_manifest(written.out)]
    assert len({"".join(nib.aff2axcodes(image.affine)) for image in images}) >= 3
    assert len({image.shape for image in images}) == len({image.header.get_zooms() for image in images}) == 6
    for image in images:
        voxels = np.asarray(image.dataobj)
        assert voxels.dtype == np.int16 and voxels.min() >= 0 and voxels.max() > 300


def test_disease_turns_tissue_into_csf(written):
    patient = draw_patient(0, "MADEUP", 0)
    severities = {"CN": 0.15, "MCI": 0.5, "AD": 0.95}
    volumes = [csf_ml(dataclasses.replace(patient, severity=s), effect=2) for s in severities.values()]
    assert volumes[0] * 1.1 < volumes[1] and volumes[1] * 1.1 < volumes[2]


def test_disease_enlarges_the_lateral_ventricles():
    patient, scan = draw_patient(0, "MADEUP", 0), draw_scan(0, "MADEUP", 0, 0, "A")
    ideal = dataclasses.replace(scan, noise=0.0, bias=0 * scan.bias, spacing_mm=np.full(3, 2.0))
    dark_deep_voxels = []
    for severity in (0.15, 0.5, 0.95):
        image = render(load_template(), dataclasses.replace(patient, severity=severity), ideal, 73, effect=2)
        centre = tuple(slice(n // 2 - 20, n // 2 + 20) for n in image.shape)
        dark_deep_voxels.append((image[centre] < (scan.csf + scan.gm) / 2).sum())
    assert dark_deep_voxels[0] * 1.2 < dark_deep_voxels[1] < dark_deep_voxels[2] / 1.2


def test_without_effect_diagnosis_leaves_no_trace_in_the_image():
    patient, scan = draw_patient(0, "MADEUP", 0), draw_scan(0, "MADEUP", 0, 0, "B")
    healthy = dataclasses.replace(patient, diagnosis="CN", severity=0.1)
    demented = dataclasses.replace(patient, diagnosis="AD", severity=1.2)
    images = [render(load_template(), p, scan, p.age_years, effect=0) for p in (healthy, demented)]
    assert np.array_equal(*images)


def test_age_is_a_confounder():
    patient = draw_patient(0, "MADEUP", 0)
    assert csf_ml(dataclasses.replace(patient, age_years=88), 1) > 1.03 * csf_ml(
        dataclasses.replace(patient, age_years=60), 1
    )


def test_sessions_are_acquired_apart():
    first, second = (draw_scan(0, "MADEUP", 0, session, "A") for session in (0, 1))
    assert first.noise_seed != second.noise_seed and first.gamma != second.gamma


def test_missing_nilearn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    with pytest.raises(ImportError, match=r"medblip\[demo\]"):
        load_template.__wrapped__()


def test_cohorts_and_seeds_are_other_patients():
    places = (0, "MADEUP"), (1, "MADEUP"), (0, "OTHER")
    assert len({draw_patient(seed, cohort, 0).age_years for seed, cohort in places}) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("subjects", 0), ("effect", -1.0), ("effect", float("nan")), ("cohort", "a/b")]
)
def test_wrong_options_are_named(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        Options(out=tmp_path, **{name: value})
