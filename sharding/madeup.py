"""Made-up patients: realistic brains with a known disease, for the demo and the tests.

Every scan is a deformed MNI152 template (it ships with nilearn, so no network is needed):

1. draw a patient: diagnosis, a continuous severity that overlaps between diagnoses, age, test scores;
2. turn severity, age and personal variation into atrophy of ventricles, cortex and hippocampi;
3. draw a scan: pose, contrast, bias field, noise, voxel grid and axis order, none of them related to disease;
4. compose every deformation into one coordinate map and resample the template once.

Everything is a pure function of (seed, cohort, subject index, scan index), whatever the workers.

Examples:
    python -m sharding.madeup --out demo/raw
    python -m sharding.madeup --out demo/other-site --cohort MADEUPB --scanner B --subjects 60 --seed 1
"""

import csv
import datetime
import math
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from sharding.manifest import COLUMNS

DIAGNOSES = ("CN", "MCI", "AD")
ORIENTATIONS = ("RAS", "LAS", "LPS", "PIR", "ASR", "RPI", "SAL", "PSL")
# The scanner's box, wide enough for the largest head in the most tilted pose.
FIELD_OF_VIEW_MM = np.array([192.0, 226.0, 200.0])
BRAIN_CENTRE_MM = np.array([0.0, -17.0, 8.0])  # in the template's space
TEMPLATE_SPACING_MM = 2.0
WARP_SPACING_MM = 4.0
CONTROL_WAVES = 6  # per axis; the shortest half-wave of a personal warp is about 35 mm
WARP_RMS_MM = 1.0  # along each axis; the largest displacement in a brain is then 3-4 mm
BIAS_WAVES = 3
BIAS_RMS = 0.12
# Healthy is 0, clear dementia about 1. The spread makes neighbouring diagnoses overlap.
SEVERITY_MEAN_SD = {"CN": (0.15, 0.14), "MCI": (0.50, 0.18), "AD": (0.95, 0.22)}
APOE_E4_FREQUENCY = {"CN": 0.14, "MCI": 0.24, "AD": 0.36}
MISSING_FRACTION = 0.07
# What one unit of severity adds to the atrophy at effect 1, in the unit of `atrophy`.
DISEASE_WEIGHT = 2.0


@dataclass(frozen=True)
class Options:
    """Write made-up patients: DIR/images/*.nii.gz and DIR/manifest.csv."""

    out: Path
    """Folder to write to; made if missing, files of the same name are replaced."""
    subjects: int = 240
    """Patients, a third of each diagnosis."""
    scans_per_subject: int = 1
    """Sessions a year apart; a patient's sessions share the anatomy."""
    effect: float = 1.0
    """Strength of the disease in the images; 0 leaves no disease signal at all, 2 is easy."""
    seed: int = 0
    """Another seed, other patients."""
    cohort: str = "MADEUP"
    """Name in the manifest; another name, other patients."""
    scanner: Literal["A", "B"] = "A"
    """A: 3 T. B: 1.5 T with another contrast, more noise and coarser voxels."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes."""

    def __post_init__(self):
        lowest_allowed = {"subjects": 1, "scans_per_subject": 1, "effect": 0, "seed": 0, "workers": 1}
        for name, lowest in lowest_allowed.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {lowest}")
        if not self.cohort.replace("-", "").isalnum():
            raise ValueError(f"cohort is {self.cohort!r}, must be letters, digits and hyphens")


@dataclass(frozen=True)
class Template:
    """The brain that all patients are made from: X Y Z in RAS+ at 2 mm; pull-backs 3 X Y Z at 4 mm, in mm."""

    gm: np.ndarray
    wm: np.ndarray
    csf: np.ndarray
    scalp: np.ndarray
    texture: np.ndarray
    """What the three tissues do not explain of the template's intensity (1 = white matter minus CSF)."""
    rim: np.ndarray
    """0-1: how much a voxel faces the sulci, where cortex is lost; more in temporal and parietal lobes."""
    hippocampus: np.ndarray
    """0-1 around the hippocampi and the temporal horns."""
    ventricle_push: np.ndarray
    """Pull-back that moves tissue 1 mm away from the lateral ventricles."""
    hippocampus_shrink: np.ndarray
    """Pull-back that shrinks the hippocampi towards their axes, by 1 mm at the surface."""
    origin_mm: np.ndarray


@dataclass(frozen=True)
class Patient:
    """Who is scanned; all that a patient's sessions share."""

    diagnosis: str
    severity: float
    age_years: float
    sex: str
    education_years: int
    apoe_e4: int
    scanned_first: datetime.date
    own_atrophy: np.ndarray
    """What this person has of (ventricles, cortex, hippocampi) regardless of age and disease."""
    head_scale: np.ndarray
    warp_mm: np.ndarray
    """Wave amplitudes of the personal warp, 3 x waves x waves x waves."""


@dataclass(frozen=True)
class Scan:
    """How one session was acquired; nothing here knows the patient."""

    rotation_deg: np.ndarray
    translation_mm: np.ndarray
    spacing_mm: np.ndarray
    orientation: str
    gm: float
    wm: float
    csf: float
    scalp: float
    gamma: float
    bias: np.ndarray
    """Wave amplitudes of the logarithm of the bias field."""
    noise: float
    """Standard deviation of each channel of the Rician noise (1 = the range of the image)."""
    noise_seed: int
    intensity_range: float
    field_strength_t: float


def generator(seed: int, cohort: str, *place: int | str) -> np.random.Generator:
    """A random stream of its own for every place in the data set."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in (cohort, *place)]
    return np.random.default_rng([seed, *words])


def draw_patient(seed: int, cohort: str, subject: int) -> Patient:
    """Draw patient number `subject`. Age, sex and head are drawn apart from the disease."""
    triple, position = divmod(subject, len(DIAGNOSES))
    diagnosis = str(generator(seed, cohort, "diagnosis", triple).permutation(DIAGNOSES)[position])
    disease = generator(seed, cohort, "disease", subject)
    mean, sd = SEVERITY_MEAN_SD[diagnosis]
    body = generator(seed, cohort, "body", subject)
    sex = str(body.choice(["F", "M"]))
    return Patient(
        diagnosis=diagnosis,
        severity=float(max(disease.normal(mean, sd), 0)),
        apoe_e4=int(disease.binomial(2, APOE_E4_FREQUENCY[diagnosis])),
        age_years=float(np.clip(body.normal(73, 7), 55, 92)),
        sex=sex,
        education_years=int(np.clip(np.round(body.normal(15.5, 2.8)), 6, 20)),
        scanned_first=datetime.date(2008, 1, 1) + datetime.timedelta(days=int(body.integers(0, 3650))),
        own_atrophy=body.normal(0, 1, 3),
        head_scale=np.clip(body.normal(1.015 if sex == "M" else 0.985, 0.03, 3), 0.92, 1.08),
        warp_mm=body.normal(0, WARP_RMS_MM / CONTROL_WAVES**1.5, (3, *[CONTROL_WAVES] * 3)),
    )


def draw_scan(seed: int, cohort: str, subject: int, session: int, scanner: str) -> Scan:
    """Draw how session number `session` of a patient was acquired."""
    rng = generator(seed, cohort, "scan", subject, session)
    contrast = {"A": (0.60, 0.88, 0.22), "B": (0.66, 0.82, 0.32)}[scanner]
    gm, wm, csf = rng.normal(contrast, (0.03, 0.025, 0.03)).tolist()
    lowest_mm, highest_mm = {"A": (1.8, 2.1), "B": (2.0, 2.4)}[scanner]
    lowest_noise, highest_noise = {"A": (0.015, 0.035), "B": (0.035, 0.06)}[scanner]
    return Scan(
        rotation_deg=np.clip(rng.normal(0, 2, 3), -8, 8),
        translation_mm=np.clip(rng.normal(0, 2, 3), -8, 8),
        spacing_mm=rng.uniform(lowest_mm, highest_mm, 3).round(3),
        orientation=str(rng.choice(ORIENTATIONS)),
        gm=gm,
        wm=wm,
        csf=csf,
        scalp=rng.uniform(0.7, 1.0),
        gamma=rng.uniform(0.85, 1.2),
        bias=rng.normal(0, BIAS_RMS / BIAS_WAVES**1.5, [BIAS_WAVES] * 3),
        noise=rng.uniform(lowest_noise, highest_noise),
        noise_seed=int(rng.integers(2**31)),
        intensity_range=float(np.exp(rng.uniform(np.log(400), np.log(8000)))),
        field_strength_t={"A": 3.0, "B": 1.5}[scanner],
    )


@cache
def load_template() -> Template:
    """Read the MNI152 template and derive the maps that disease acts through.

    Raises:
        ImportError: nilearn, which ships the template, is not installed.
    """
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ImportError as error:
        raise ImportError('made-up patients need nilearn: pip install "medblip[demo]"') from error
    from scipy import ndimage

    image = load_mni152_template(resolution=round(TEMPLATE_SPACING_MM))
    t1 = image.get_fdata(dtype=np.float32)
    gm = load_mni152_gm_template(resolution=round(TEMPLATE_SPACING_MM)).get_fdata(dtype=np.float32).clip(0, 1)
    wm = load_mni152_wm_template(resolution=round(TEMPLATE_SPACING_MM)).get_fdata(dtype=np.float32).clip(0, 1)
    brain = ndimage.binary_fill_holes(t1 > 0.1)
    gm, wm = gm * brain, wm * brain
    csf = (brain - gm - wm).clip(0, 1)
    tissues = np.stack([gm, wm, csf])[:, brain]
    intensities = np.linalg.lstsq(tissues.T, t1[brain], rcond=None)[0]
    texture = np.zeros_like(t1)
    texture[brain] = (t1[brain] - intensities @ tissues) / (intensities[1] - intensities[2])

    origin_mm = image.affine[:3, 3]
    x, y, z = (
        np.arange(n, dtype=np.float32).reshape(shape) * TEMPLATE_SPACING_MM + start
        for n, shape, start in zip(t1.shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), origin_mm, strict=True)
    )
    depth_mm = ndimage.distance_transform_edt(brain) * TEMPLATE_SPACING_MM
    outside_mm = ndimage.distance_transform_edt(~brain) * TEMPLATE_SPACING_MM
    deep = (csf > 0.5) & (depth_mm > 20) & (np.abs(x) < 40) & (z > -8) & (z < 36) & (y < 45) & (y > -52)
    labels, _ = ndimage.label(deep)
    ventricles = labels == np.bincount(labels[labels > 0]).argmax()

    # The hippocampal axis: from the head, just behind the amygdala, up and back to the tail.
    along = ((y + 38) / 30).clip(0, 1)
    aside, above = np.abs(x) - (24 + 4 * along), z - (-4 - 16 * along)
    behind = y - y.clip(-38, -8)
    axis_mm = np.sqrt(aside**2 + above**2 + behind**2)
    hippocampus = np.exp(-((axis_mm / 7) ** 2) / 2)
    from_axis_mm = np.stack(np.broadcast_arrays(np.sign(x) * aside, behind, above))

    facing = ndimage.gaussian_filter((csf * ~ventricles * (depth_mm < 25) + ~brain).astype(np.float32), 1.0)
    temporoparietal = np.exp(-(((y + 35) / 40) ** 2)) * np.exp(-(((np.abs(x) - 45) / 30) ** 2))
    cerebrum = 1 / (1 + np.exp(-(z + 30 - 0.4 * np.minimum(y + 40, 0)) / 4))
    rim = (facing / 0.6).clip(0, 1) * (0.5 + 0.5 * temporoparietal) * cerebrum

    outward_mm = TEMPLATE_SPACING_MM * (
        ndimage.distance_transform_edt(~ventricles) - ndimage.distance_transform_edt(ventricles)
    )
    away = np.stack(np.gradient(ndimage.gaussian_filter(outward_mm, 2.0), TEMPLATE_SPACING_MM))
    # Full push at the wall, fading towards the cortex, which the skull holds in place.
    fade = np.exp(-((outward_mm.clip(0) / 18) ** 2)) * (1 - np.exp(-((depth_mm / 12) ** 2)))
    shrink = from_axis_mm / 6 * np.exp(-((axis_mm / 9) ** 2) / 2)
    return Template(
        gm=gm,
        wm=wm,
        csf=csf,
        texture=texture,
        scalp=scalp_shell(outside_mm, z),
        rim=rim.astype(np.float32),
        hippocampus=hippocampus.astype(np.float32),
        ventricle_push=(-away * fade)[:, ::2, ::2, ::2].astype(np.float32),
        hippocampus_shrink=shrink[:, ::2, ::2, ::2].astype(np.float32),
        origin_mm=origin_mm.astype(np.float32),
    )


def scalp_shell(outside_mm: np.ndarray, z_mm: np.ndarray) -> np.ndarray:
    """A bright scalp 7-12 mm outside the brain, the dark skull below it; it fades out towards the neck."""
    shell = 1 / (1 + np.exp(-(outside_mm - 7.5))) - 1 / (1 + np.exp(-(outside_mm - 12.5)))
    return (shell / (1 + np.exp(-(z_mm + 45) / 5))).astype(np.float32)


def waves(amplitudes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth field `... X Y Z` from amplitudes of cosine waves; its mean square is the sum of theirs."""
    field = amplitudes.astype(np.float32)
    for size in shape:
        # Each turn consumes the first wave axis and appends the voxel axis, which ends as X Y Z.
        order = np.arange(field.shape[-3])[:, None]
        basis = np.cos(np.pi * order * (np.arange(size) + 0.5) / size) * np.where(order > 0, np.sqrt(2), 1)
        field = np.einsum("...abc,ax->...bcx", field, basis.astype(np.float32))
    return field


def atrophy(patient: Patient, age_years: float, effect: float) -> tuple[float, float, float]:
    """How far the ventricle walls moved, in mm; the shares lost of cortex and hippocampus.

    Zero is the young template. All saturate: no severity folds the deformation or eats a whole lobe.
    """
    shared = 0.6 + 0.2 * (age_years - 73) / 7 + DISEASE_WEIGHT * effect * patient.severity
    ventricles, cortex, hippocampus = np.maximum(shared + 0.25 * patient.own_atrophy, 0).tolist()
    wall_mm = 18 * (1 - math.exp(-0.13 * ventricles))
    return wall_mm, 1 - math.exp(-0.26 * cortex), 1 - math.exp(-0.26 * hippocampus)


def render(template: Template, patient: Patient, scan: Scan, age_years: float, effect: float) -> np.ndarray:
    """Scan the patient: intensities from 0 to about 1, X Y Z in RAS+, voxels of `scan.spacing_mm`."""
    wall_mm, cortex_lost, hippocampus_lost = atrophy(patient, age_years, effect)

    # Tissue: what is lost becomes CSF. Interpolation is linear, so the tissues mix before it, in one volume.
    gm = template.gm * (1 - cortex_lost * template.rim) * (1 - hippocampus_lost * template.hippocampus)
    wm = template.wm * (1 - 0.5 * hippocampus_lost * template.hippocampus)
    csf = template.csf + (template.gm - gm) + (template.wm - wm)
    head = scan.gm * gm + scan.wm * wm + scan.csf * csf + scan.scalp * template.scalp
    head += (scan.wm - scan.csf) * template.texture

    # Space, pulled back from the scanner to the template: pose, then the personal warp, then the disease.
    warp_mm = waves(patient.warp_mm, template.ventricle_push.shape[1:])
    disease_mm = wall_mm * template.ventricle_push + 3 * hippocampus_lost * template.hippocampus_shrink
    points_mm = lattice(warp_mm.shape[1:], np.eye(3) * WARP_SPACING_MM, template.origin_mm) + warp_mm
    deformation_mm = warp_mm + sample(disease_mm, points_mm, template.origin_mm, WARP_SPACING_MM)
    shape = np.round(FIELD_OF_VIEW_MM / scan.spacing_mm).astype(int)
    pose = rotation(scan.rotation_deg).T / patient.head_scale[:, None]
    corner_mm = pose @ (-(shape - 1) / 2 * scan.spacing_mm - scan.translation_mm) + BRAIN_CENTRE_MM
    points_mm = lattice(shape, pose * scan.spacing_mm, corner_mm)
    points_mm += sample(deformation_mm, points_mm, template.origin_mm, WARP_SPACING_MM)
    image = sample(head[None], points_mm, template.origin_mm, TEMPLATE_SPACING_MM)[0]

    image = image.clip(0) ** scan.gamma * np.exp(waves(scan.bias, image.shape))
    if scan.noise > 0:
        rng = np.random.default_rng(scan.noise_seed)
        real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32)
        image = np.hypot(image + scan.noise * real, scan.noise * imaginary)
    return image


def rotation(angles_deg: np.ndarray) -> np.ndarray:
    """The rotation matrix about X, then Y, then Z."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()


def lattice(shape: tuple[int, ...], step_mm: np.ndarray, corner_mm: np.ndarray) -> np.ndarray:
    """Positions `3 X Y Z` of a grid's voxels; column i of `step_mm` is one voxel along axis i."""
    x, y, z = (np.outer(step, np.arange(n)) for step, n in zip(step_mm.T, shape, strict=True))
    plane = (corner_mm[:, None] + x)[:, :, None, None] + y[:, None, :, None]
    return plane.astype(np.float32) + z[:, None, None, :].astype(np.float32)


def sample(field: np.ndarray, points_mm: np.ndarray, origin_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Interpolate `field` (C X Y Z) at positions `3 X Y Z`; outside it is the border's value."""
    import torch

    # grid_sample counts from -1 to 1 between the centres of the outer voxels and wants the last axis first.
    half_size = (np.array(field.shape[1:]) - 1) / 2
    scale = torch.from_numpy((1 / (half_size * spacing_mm)).astype(np.float32))
    offset = torch.from_numpy((origin_mm / (half_size * spacing_mm) + 1).astype(np.float32))
    points = torch.from_numpy(points_mm).permute(1, 2, 3, 0) * scale - offset
    return torch.nn.functional.grid_sample(
        torch.from_numpy(field)[None], points.flip(-1)[None], padding_mode="border", align_corners=True
    )[0].numpy()


def draw_scores(patient: Patient, rng: np.random.Generator) -> dict[str, float]:
    """The test scores of one visit."""
    severity = patient.severity
    dementia_stage = 0.5 if severity < 0.8 else 1 if severity < 1.3 else 2
    return {
        "mmse": int(np.clip(np.round(30.2 - 9 * severity + rng.normal(0, 1.3)), 0, 30)),
        "moca": int(np.clip(np.round(27.5 - 11 * severity + rng.normal(0, 1.8)), 0, 30)),
        "cdr_global": {"CN": 0, "MCI": 0.5, "AD": dementia_stage}[patient.diagnosis],
        "cdr_sb": round(2 * max(7 * severity**1.5 - 0.7 + rng.normal(0, 0.5), 0)) / 2,
    }


def record(patient: Patient, options: Options, subject: int, session: int, scan: Scan) -> dict:
    """The manifest's row of one scan; empty where the visit did not measure something."""
    rng = generator(options.seed, options.cohort, "visit", subject, session)
    subject_id, session_id = f"sub-{subject + 1:04d}", f"ses-{session + 1:02d}"
    measured = {
        "education_years": patient.education_years,
        "apoe_e4": patient.apoe_e4,
        **draw_scores(patient, rng),
    }
    kept = {name: value for name, value in measured.items() if rng.random() >= MISSING_FRACTION}
    return {
        **dict.fromkeys(COLUMNS, ""),
        "scan_id": f"{options.cohort}_{subject_id}_{session_id}",
        "cohort": options.cohort,
        "subject_id": subject_id,
        "session_id": session_id,
        "image": f"images/{subject_id}_{session_id}.nii.gz",
        "diagnosis": patient.diagnosis,
        "diagnosis_source": "made up",
        "diagnosis_gap_days": 0,
        "age_years": round(patient.age_years + session, 1),
        "sex": patient.sex,
        **kept,
        "field_strength_t": scan.field_strength_t,
        "acquired": (patient.scanned_first + datetime.timedelta(days=365 * session)).isoformat(),
    }


def render_scan(template: Template, patient: Patient, options: Options, subject: int, session: int):
    """Draw how a session was acquired and render it: a RAS+ NIfTI image, int16, and the drawn `Scan`."""
    import nibabel as nib

    scan = draw_scan(options.seed, options.cohort, subject, session, options.scanner)
    image = render(template, patient, scan, patient.age_years + session, options.effect)
    affine = np.diag([*scan.spacing_mm, 1.0])
    affine[:3, 3] = -(np.array(image.shape) - 1) / 2 * scan.spacing_mm
    return nib.Nifti1Image((image * scan.intensity_range).round().astype(np.int16), affine), scan


def write_oriented(path: Path, image, axes: str) -> None:
    """Writes a RAS+ image with voxel axes `axes`; for `.hdr`, as an Analyze 7.5 pair."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    if path.suffix == ".hdr":
        pair = nib.AnalyzeImage(image.get_fdata().astype(np.int16), None)
        pair.header.set_zooms(image.header.get_zooms()[:3])
        pair.header["orient"] = {"LAS": 0, "ASL": 2}[axes]
        pair.to_filename(path)
    else:
        image.to_filename(path)


def write_scan(template: Template, options: Options, subject: int, session: int) -> dict:
    """Draw, render and store one scan in its own axis order; return its row of the manifest."""
    patient = draw_patient(options.seed, options.cohort, subject)
    stored, scan = render_scan(template, patient, options, subject, session)
    row = record(patient, options, subject, session, scan)
    write_oriented(options.out / row["image"], stored, scan.orientation)
    return row


def write_madeup(options: Options) -> Path:
    """Write all images, then the manifest, which is complete or absent. Return the manifest's path."""
    from tqdm import tqdm

    (options.out / "images").mkdir(parents=True, exist_ok=True)
    template = load_template()
    places = [(s, v) for s in range(options.subjects) for v in range(options.scans_per_subject)]
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(
        min(options.workers, len(places)), get_context("spawn"), _start_worker, (template, options)
    ) as pool:
        rows = list(tqdm(pool.map(_work, places), total=len(places), desc="scans", disable=None))
    manifest = options.out / "manifest.csv"
    unfinished = manifest.with_name("manifest.csv.tmp")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(manifest)
    return manifest


def _start_worker(template: Template, options: Options) -> None:
    import torch

    torch.set_num_threads(1)  # the processes already fill the cores
    global _template, _options
    _template, _options = template, options


def _work(place: tuple[int, int]) -> dict:
    return write_scan(_template, _options, *place)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    try:
        manifest = write_madeup(options)
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    num_scans = options.subjects * options.scans_per_subject
    print(f"ok {num_scans} scans of {options.subjects} patients", file=sys.stderr)
    print(manifest)


if __name__ == "__main__":
    main()
