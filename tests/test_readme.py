"""What README and docs name is there: files of the map, options of the commands."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from sharding.manifest import RELEASES

PAGES = [ROOT / "README.md", ROOT / "ds_configs/README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    ["train.py"],
    *(["-m", f"sharding.{name}"] for name in ("build", "verify", "quality", "merge", "audit", "madeup", "releases")),
    *(["-m", "sharding.manifest", name] for name in RELEASES),
    *(["-m", "medblip.cli", name] for name in ("evaluate", "compare", "ask", "fetch", "plan", "doctor", "demo")),
]
# Options of the launchers and of git, pip, sbatch and apptainer, which the pages show beside ours.
OTHERS = {
    "array", "num_gpus", "nproc-per-node", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "signals-to-handle",
    "rounds", "volumes", "run-path", "module", "no-build-isolation", "kill-on-bad-exit", "wait", "signal", "help",
    "version", "nv",
}  # fmt: skip


@pytest.fixture(scope="module")
def known_options():
    known = set(OTHERS)
    for command in COMMANDS:
        shown = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        known |= set(re.findall(r"--([a-z][\w-]*)", shown.stdout))
    return known | {name.replace("-", "_") for name in known}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_names_exists(page, known_options):
    if page.name == "log.md":
        pytest.skip("a log tells of what once was")
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()))
    assert not named - known_options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_map_names_every_module_and_nothing_else():
    text = (ROOT / "README.md").read_text()
    part = text[text.index("## Where things are") :]
    named = set(re.findall(r"([a-z_]+)\.py", part))
    modules = {path.stem for folder in ("medblip", "sharding") for path in (ROOT / folder).glob("*.py")}
    existing = modules - {"__init__", "cli", "fetch"} | {"train"}
    assert named == existing
    for name in re.findall(r"^([\w./]+/?)  ", part, flags=re.M):
        assert (ROOT / name).exists(), name
