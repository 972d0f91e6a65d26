"""report.md and report.html: whole, true to report.json, and in need of nothing but themselves."""

import base64
import json
import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import require_tool
from made_up_evaluation import made_up_evaluation, write_made_up
from matplotlib.image import imread

from medblip.figures import draw_forest
from medblip.report import plain_table, write_report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    write_made_up(folder)
    return folder


class Tables(HTMLParser):
    """The cells of every table, by the headings above it."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[tuple[str, str], list[list[str]]] = {}
        self.titles, self.inside = {"h2": "", "h3": ""}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("h2", "h3"):
            self.titles |= {tag: ""} if tag == "h3" else {"h2": "", "h3": ""}
            self.inside = tag
        elif tag == "table":
            self.rows = self.found.setdefault((self.titles["h2"], self.titles["h3"]), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = "cell"

    def handle_endtag(self, tag):
        if tag in ("h2", "h3", "td", "th"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == "cell":
            self.rows[-1][-1] += data
        elif self.inside:
            self.titles[self.inside] += data


def tables(folder) -> dict[tuple[str, str], list[list[str]]]:
    return Tables((folder / "report.html").read_text()).found


def printed(scores: dict, *metrics: str) -> list[str]:
    return [
        f"{scores[m]:.3f} [{scores['ci95'][m][0]:.3f}, {scores['ci95'][m][1]:.3f}]" if scores[m] is not None else "-"
        for m in metrics
    ]


CONFUSION = "Confusion; a shuffled arm counts each scan once per round"
MAIN = ("balanced_accuracy", "macro_auc", "macro_f1")


def test_every_score_of_the_page_is_that_of_report_json(written):
    report, found = json.loads((written / "report.json").read_text()), tables(written)
    cells = 0
    for cohort, arms in report["cohorts"].items():
        rows = {row[0]: row[1:] for row in found[cohort, ""][1:]}
        for name, scores in arms.items():
            expected = printed(scores, *MAIN) if scores["ci95"] else ["-"] * 3
            assert rows[name] == [*expected, str(scores["n_scans"]), str(scores["n_subjects"])]
            cells += len(expected)
        for name, scores in (report["baselines"].get(cohort) or {}).items():
            assert printed(scores, *MAIN) in [row[:3] for row in rows.values()], name
        if cohort == "ONE":
            continue
        assert rows["chance"][0] == f"{1 / len(arms['image']['classes']):.3f}"
        summary = next(row for row in found["Summary", "Balanced accuracy [95 % interval]"] if row[0] == cohort)
        assert summary[2:4] == [str(arms["image"]["n_subjects"]), *printed(arms["image"], "balanced_accuracy")]
        both = next(pair for pair in report["comparisons"][cohort] if (pair["a"], pair["b"]) == ("both", "text"))
        assert summary[-1] == f"{both['difference']:.3f} [{both['ci95'][0]:.3f}, {both['ci95'][1]:.3f}]"
        calibration = {row[0]: row[1:] for row in found[cohort, "Calibration"][1:]}
        for name, scores in arms.items():
            assert calibration[name][0] == f"{scores['ece']:.3f}"
            assert calibration[name][2:] == printed(scores, "brier")
        confusion = found[cohort, CONFUSION][1:]
        for name, scores in arms.items():
            mine = [row for row in confusion if row[0] == name]
            assert [[int(cell) for cell in row[2:-2]] for row in mine] == scores["confusion"]
            for column, rate in ((-2, "recall"), (-1, "specificity")):
                rates = [(scores[rate][c], *scores["ci95"][rate][c]) for c in scores["classes"]]
                assert [row[column] for row in mine] == [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in rates]
        subgroups = {(row[0], row[1]): row[3:6] for row in found[cohort, "Subgroups"][1:]}
        for name, groups in report["subgroups"][cohort].items():
            for group, scores in groups.items():
                assert subgroups[name, group] == printed(scores, *MAIN)
        single = {row[0]: row[1:4] for row in found[cohort, "One scan per subject"][1:]}
        assert single == {name: printed(s, *MAIN) for name, s in report["one_scan_per_subject"][cohort].items()}
        pairs = [row[2] for row in found[cohort, "Paired comparisons, on the same scans"][1:]]
        assert pairs == [
            f"{pair['difference']:.3f} [{pair['ci95'][0]:.3f}, {pair['ci95'][1]:.3f}]"
            for pair in report["comparisons"][cohort]
        ]
        questions = found[cohort, "Other questions"]
        for reading, asked in report["vqa"][cohort].items():
            assert printed(asked["sex"], "accuracy")[0] in next(r for r in questions if r[:2] == ["sex", reading])
            assert printed(asked["age"], "mae")[0] in next(r for r in questions if r[:2] == ["age", reading])
    assert cells > 40
    markdown = (written / "report.md").read_text()
    in_page = {cell for rows in found.values() for row in rows for cell in row if re.fullmatch(r"[\d.]+ \[.*\]", cell)}
    assert len(in_page) > 40 and all(cell in markdown for cell in in_page), "both are made of the same blocks"


def test_page_holds_its_pictures_and_names_no_address(written):
    page = (written / "report.html").read_text()
    assert not re.search(
        r"https?:|//\w|@import|url\(|<script|<link(?! rel=\"icon\" href=\"data:,\")", page.split("<body>")[0]
    )
    body = re.sub(r'src="data:image/png;base64,[^"]*"', "", page)
    assert "http:" not in body and "https" not in body
    assert "src=" not in body and "href=" not in body.split("<body>")[1]
    pictures = {base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)", page)}
    files = [*(written / "figures").iterdir(), *(written / "worst").iterdir()]
    assert len(files) == 6 + 4 and pictures == {path.read_bytes() for path in files}
    linked = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (written / "report.md").read_text())
    assert sorted(linked) == sorted(path.relative_to(written).as_posix() for path in files)


def test_no_picture_is_empty(written):
    for path in [*(written / "figures").iterdir(), written / "confusion.png"]:
        pixels = imread(path)[..., :3].min(axis=2)
        assert len(np.unique(pixels)) > 20, path.name
        assert 0.02 < (pixels < 0.95).mean() < 0.95, path.name


def test_forest_plot_changes_with_its_numbers(tmp_path):
    arms = made_up_evaluation()[0]["cohorts"]["AIBL"]
    assert draw_forest(tmp_path / "a.png", "AIBL", arms, {})
    arms["image"]["ci95"]["balanced_accuracy"] = [0.1, 0.9]
    assert draw_forest(tmp_path / "b.png", "AIBL", arms, {})
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_says_how_it_was_made(written):
    report = json.loads((written / "report.json").read_text())
    for text in ((written / "report.md").read_text(), (written / "report.html").read_text()):
        for told in (
            report["commit"],
            report["split_sha256"],
            "spacing_mm: 2.2",
            "cognition",
            "scored: 128",
            "steps: 800",
        ):
            assert told in text
        assert "chosen on the split val" in text and all(note in text for note in report["notes"])
        assert text.count("Research use only") == 2
    assert "pooled" in text and not re.search("overall", text, re.I)


@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_report_without_an_entry_lacks_only_its_section(tmp_path, how):
    report, _ = made_up_evaluation()
    del report["cohorts"]["AIBL"]  # one to draw is enough
    missing = "baselines comparisons subgroups age_matched one_scan_per_subject vqa worst trained_on rule counts notes"
    for name in (*missing.split(), "recipe", "commit", "split_sha256"):
        report[name] = None
        if how == "absent":
            del report[name]
    write_report(tmp_path, report)
    assert {title for title, _ in tables(tmp_path)} == {"Summary", "MIRIAD", "ONE", "How it was made"}
    assert {part for title, part in tables(tmp_path) if title == "MIRIAD"} == {"", CONFUSION, "Calibration"}
    assert "unknown" in (tmp_path / "methods.md").read_text()


def test_names_from_data_cannot_be_markup(tmp_path):
    report, _ = made_up_evaluation()
    del report["cohorts"]["AIBL"]
    report["cohorts"]["<script>alert(1)</script>|x/../y"] = report["cohorts"].pop("MIRIAD")
    write_report(tmp_path, report)
    assert "<script" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()
    assert all(path.is_file() for path in (tmp_path / "figures").iterdir())


def test_an_earlier_evaluation_leaves_no_picture(tmp_path):
    report, _ = made_up_evaluation()
    del report["cohorts"]["AIBL"]
    write_report(tmp_path, report)
    assert (tmp_path / "figures").exists() and (tmp_path / "confusion.png").exists()
    report["cohorts"] = {"ONE": report["cohorts"]["ONE"]}
    write_report(tmp_path, report)
    assert not (tmp_path / "figures").exists() and not (tmp_path / "confusion.png").exists()


def test_terminal_has_a_row_for_each_arm(written):
    lines = plain_table(json.loads((written / "report.json").read_text())).splitlines()
    assert len(lines) == 4 + (6 + 1) * 2 + (4 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_page_is_as_wide_as_the_window(written, tmp_path, width):
    """On a telephone wide tables and pictures scroll by themselves, not the page (Chromium's least width is 500)."""
    browser = require_tool("chromium", "apt-get install chromium")
    # A copy with a script, and so without the policy that would not let it run.
    page = re.sub(r"<meta http-equiv[^>]*>", "", (written / "report.html").read_text())
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", measure))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width},2000", "--hide-scrollbars", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, check=True, timeout=180, capture_output=True, text=True).stdout
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert window == width and wide <= window


@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_page_even_if_markup_got_in(written, tmp_path):
    browser = require_tool("chromium", "apt-get install chromium")
    page = (written / "report.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", "<script>document.title = 'ran'</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, check=True, timeout=180, capture_output=True, text=True).stdout
    assert "<title>Zero-shot diagnosis" in dom and "<title>ran" not in dom


@pytest.mark.slow
def test_page_opens_in_a_browser_without_network(written, tmp_path):
    browser = require_tool("chromium", "apt-get install chromium")
    command = ["unshare", "--net", "--map-root-user"] if _may_unshare() else []
    command += [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    page = (written / "report.html").as_uri()
    shot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", "--window-size=1200,3000", page], check=True, timeout=180)
    pixels = imread(shot)[..., :3]
    # The forest plot's blue and the red line of chance: pictures were decoded, not only text laid out.
    for colour in ((0x1F, 0x77, 0xB4), (0xB2, 0x18, 0x2B)):
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=2) < 0.02).sum() > 200
    dom = subprocess.run([*command, "--dump-dom", page], check=True, timeout=180, capture_output=True, text=True).stdout
    assert Tables(dom).found == tables(written)


def _may_unshare() -> bool:
    return subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode == 0
