import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, require_tool
from PIL import Image

from sharding.build import Options as BuildOptions
from sharding.build import build
from sharding.manifest import read_manifest
from sharding.packed import block_means, read_packed
from sharding.quality import Options, choose, look
from sharding.quality_page import PLANE_EDGE, draw_tile

X, Y, Z = np.meshgrid(np.arange(40), np.arange(44), np.arange(40), indexing="ij")


def head(seed: int) -> np.ndarray:
    """A person's own head of about 2 l at 4 mm, front and back told apart, with a bright ball on the left."""
    rng = np.random.default_rng(seed)
    rx, ry, rz = np.array([15, 18, 14]) + rng.normal(0, 0.3, 3)
    voxels = rng.normal(0, 4, X.shape)
    voxels[((X - 20) / rx) ** 2 + ((Y - 22) / ry) ** 2 + ((Z - 22) / rz) ** 2 < 1] += 300 + rng.normal(0, 10)
    for x, y, z in rng.integers(14, 27, (6, 3)):
        voxels[(X - x) ** 2 + (Y - y) ** 2 + (Z - z) ** 2 < 9] -= 120
    voxels[(X - 12) ** 2 + (Y - 26) ** 2 + (Z - 24) ** 2 < 16] += 500
    voxels[(X - 20) ** 2 + (Y - 10) ** 2 + (Z - 16) ** 2 < 25] -= 150
    return np.abs(voxels).astype(np.int16)


def pack(folder: Path, odd: dict[str, np.ndarray], count: int = 24, cohort: str = "SITE") -> Path:
    """Shards of `count` people and of the odd images, by scan_id."""
    images = {f"person-{n}": head(n) for n in range(count)} | odd
    rows = []
    for number, (scan_id, voxels) in enumerate(images.items()):
        nib.save(nib.Nifti1Image(voxels, np.diag([4.0, 4, 4, 1])), folder / f"{number}.nii")
        rows.append([f"{number}.nii", scan_id, scan_id, cohort, ("CN", "AD", "")[number % 3], "train"])
    with open(folder / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "scan_id", "subject_id", "cohort", "diagnosis", "split"], *rows])
    options = BuildOptions(manifest=folder / "m.csv", out=folder / "shards", size=40, spacing_mm=4.5, workers=1)
    assert build(options) == 0
    name_keys(folder / "shards", folder / "m.csv")
    return folder / "shards"


def name_keys(shards: Path, manifest: Path) -> None:
    """split.csv with the column `key`."""
    keys = {scan.scan_id: scan.key for scan in read_manifest(manifest)}
    with open(shards / "split.csv", newline="") as file:
        rows = [row | {"key": keys[row["scan_id"]]} for row in csv.DictReader(file)]
    with open(shards / "split.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def table_of(out: Path) -> list[dict]:
    with open(out / "outliers.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """24 people, one of them copied and one scanned again under other names, and one scan whose name is HTML."""
    folder = tmp_path_factory.mktemp("plain")
    again = head(5) * 2 + np.random.default_rng(0).integers(0, 12, X.shape).astype(np.int16)
    return pack(folder, {"copy": head(3), "again": again, "<script>alert(1)</script>": head(90)})


@pytest.fixture(scope="module")
def looked(plain, tmp_path_factory) -> Path:
    """The output folder for `plain`."""
    out = tmp_path_factory.mktemp("qc")
    look(Options(shards=plain, out=out, workers=1))
    return out


def test_a_copied_image_under_another_subject_is_named(looked):
    flags = {row["scan"]: row["flags"] for row in table_of(looked)}
    assert "the same image as person-3 of another subject, in train" in flags["copy"]
    assert "the same image as copy of another subject" in flags["person-3"]
    assert "nearly the same image as person-5 of another subject" in flags["again"]
    copies = {name for name, words in flags.items() if "same image" in words}
    assert copies == {"copy", "person-3", "again", "person-5"}


def test_people_who_are_like_each_other_are_not_flagged(looked):
    flagged = [row["scan"] for row in table_of(looked) if row["flags"] and "same image" not in row["flags"]]
    assert len(flagged) <= 1, flagged


@pytest.mark.parametrize("odd", ["empty", "half", "upside_down", "cut"])
def test_an_empty_cut_or_turned_scan_comes_first(tmp_path, odd):
    voxels, expected = head(99), "foreground"
    if odd == "empty":
        voxels[(X - 20) ** 2 + (Y - 22) ** 2 + (Z - 22) ** 2 > 16] = 2
    elif odd == "half":
        voxels = voxels[:, :, 22:]
    elif odd == "cut":
        voxels, expected = voxels[12:], "cut off"
    else:
        voxels, expected = voxels[:, :, ::-1], "likeness"
    shards = pack(tmp_path, {"odd": voxels})
    assert look(Options(shards=shards, out=tmp_path / "qc", workers=1))[1] >= 1
    first = table_of(tmp_path / "qc")[0]
    assert first["scan"] == "odd" and expected in first["flags"], first
    assert re.search(r"[\d.]+ MAD (below|above) SITE", first["flags"])


def test_a_small_cohort_is_compared_with_all_scans(tmp_path):
    dark = head(98)
    dark[(X - 20) ** 2 + (Y - 22) ** 2 + (Z - 22) ** 2 > 16] = 2
    shards = pack(tmp_path, {"odd": dark}, count=8)
    look(Options(shards=shards, out=tmp_path / "qc", workers=1))
    assert table_of(tmp_path / "qc")[0]["scan"] == "odd"
    assert "below all scans" in table_of(tmp_path / "qc")[0]["flags"]


def test_left_is_marked_left(plain):
    tile = np.asarray(Image.open(io.BytesIO(draw_tile(read_packed(plain)[0]))), dtype=float)
    middle, marks = PLANE_EDGE // 2, slice(PLANE_EDGE // 2 - 6, PLANE_EDGE // 2 + 7)
    axial = tile[:, :PLANE_EDGE]
    bright = np.where(axial > 0.9 * axial.max(), 1.0, 0.0)
    bright[marks, :16] = bright[marks, -16:] = 0  # the letters
    assert (bright.sum(axis=0) @ np.arange(PLANE_EDGE)) / bright.sum() < middle - 10, "the ball is in the left half"

    def ink(letter: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(letter > 128)
        return letter[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] > 128

    left, right = ink(axial[marks, :14]), ink(axial[marks, -14:])
    upper = len(left) // 2
    assert not left[: upper - 1, -3:].any() and left[-2:, -3:].any(), "an L has nothing at the upper right"
    assert right[: len(right) // 2, -3:].any(), "an R has"


def test_the_page_needs_no_network(looked):
    page = (looked / "index.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|<link|<script[^>]+src|@import|url\(", page)
    for picture in json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])["pictures"].values():
        assert picture.startswith("/9j/")  # a JPEG, in the page itself


def test_pictures_come_before_the_table(looked):
    page = (looked / "index.html").read_text()
    assert page.index('id="pictures"') < page.index('id="cohorts"') < page.index('id="table"')


def test_names_in_the_page_are_escaped(looked):
    page = (looked / "index.html").read_text()
    assert "\\u003cscript>alert(1)\\u003c/script>" in page and "<script>alert" not in page


def test_without_names_the_key_stands_for_the_scan(plain, tmp_path):
    for path in plain.glob("*"):
        if path.is_file() and path.name != "split.csv":
            (tmp_path / path.name).symlink_to(path)
    scans = read_packed(tmp_path)
    assert len(scans) == 27 and all(scan.name == scan.key for scan in scans)


def test_few_pictures_are_the_worst_and_some_of_each_cohort(plain, tmp_path):
    assert look(Options(shards=plain, out=tmp_path, max_pictures=6, workers=1))[0] == 27
    page = (tmp_path / "index.html").read_text()
    shown = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])["pictures"]
    rows = table_of(tmp_path)
    assert len(rows) == 27 and len(shown) == 6
    assert {row["key"] for row in rows[:3]} <= shown.keys()
    assert len(list((tmp_path / "pages").iterdir())) == 1


def test_every_cohort_has_a_share_of_the_random_pictures():
    from types import SimpleNamespace as Some

    judged = [Some(scan=Some(key=str(n), cohort="BIG" if n % 25 else "SMALL")) for n in range(200)]
    chosen = choose(judged, 20)
    assert len(chosen) == 20 and [one.scan.key for one in chosen[:10]] == [str(n) for n in range(10)]
    assert sum(one.scan.cohort == "SMALL" for one in chosen[10:]) == 5
    assert chosen == choose(judged, 20)


def test_the_same_shards_give_the_same_files_whatever_the_workers(plain, looked, tmp_path):
    look(Options(shards=plain, out=tmp_path, workers=2))
    for name in ("outliers.csv", "index.html", "pages/page-001.jpg"):
        assert (tmp_path / name).read_bytes() == (looked / name).read_bytes()


def test_block_means_are_means_of_whole_blocks():
    volume = np.random.default_rng(0).integers(0, 256, (9, 8, 7), dtype=np.uint8)
    expected = volume[:8, :6, :7].reshape(4, 2, 2, 3, 7, 1).mean(axis=(1, 3, 5))
    assert np.allclose(block_means(volume, [2, 3, 1]), expected)


def test_a_damaged_sample_is_an_error_with_its_name(plain, tmp_path):
    for path in plain.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    scan = read_packed(tmp_path)[2]
    with open(scan.shard, "r+b") as file:
        file.seek(scan.volume[0])
        file.write(bytes(64))
    with pytest.raises(ValueError, match=f"{scan.key} is damaged.*sharding.verify"):
        look(Options(shards=tmp_path, out=tmp_path / "qc", workers=1))


def test_outliers_are_no_failure_and_the_last_line_says_how_many(plain, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sharding.quality", str(plain), "--out", str(tmp_path), "--workers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'index.html'}\n"
    flagged = sum(bool(row["flags"]) for row in table_of(tmp_path))
    assert done.stderr.splitlines()[-1] == f"ok 27 scans, {flagged} flagged -> {tmp_path / 'outliers.csv'}"


def test_what_is_no_folder_of_shards_is_said(tmp_path):
    with pytest.raises(ValueError, match="index.json is missing"):
        look(Options(shards=tmp_path, out=tmp_path / "qc"))


@pytest.mark.slow
def test_ratings_are_saved_by_a_browser(looked, tmp_path):
    chromium = require_tool("chromium", "apt-get install chromium")
    page = (looked / "index.html").read_text()
    clicks = """<script>
    document.querySelector("#pictures .rate[value=bad]").click();
    document.querySelectorAll("#pictures .rate[value=ok]")[1].click();
    byId("search").value = "person-7"; show(); document.querySelector("#pictures .rate[value=bad]").click();
    byId("flagged").value = "bad"; byId("search").value = ""; show();
    byId("export").click();
    document.title = byId("count").textContent;
    byId("flagged").value = ""; byId("search").value = "alert("; show();
    </script></body>"""
    (tmp_path / "clicked.html").write_text(page.replace("</body>", clicks))
    preferences = tmp_path / "profile/Default/Preferences"
    preferences.parent.mkdir(parents=True)
    preferences.write_text(json.dumps({"download": {"default_directory": str(tmp_path / "saved")}}))
    options = ["--headless", "--no-sandbox", "--timeout=5000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [chromium, *options, f"file://{tmp_path / 'clicked.html'}"], capture_output=True, text=True, timeout=120
    )
    rows = [row["scan"] for row in table_of(looked)]
    saved = (tmp_path / "saved/ratings.csv").read_text().splitlines()
    assert saved[0] == "scan,rating" and sorted(saved[1:]) == sorted(
        [f"{rows[0]},bad", f"{rows[1]},ok", "person-7,bad"]
    )
    assert "<title>2 scans, 2 pictures</title>" in done.stdout  # those rated bad
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</b>" in done.stdout
