"""The shape of the repository: which way imports go, where libraries may be used, and what every file keeps to."""

import ast
import re
import resource
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

# A module imports only from rows above its own. A name may stand here before its module exists.
LAYERS = [
    ["config"],
    ["distributed", "schedule", "text", "augment", "dicom", "stopping", "lines"],
    ["image", "remote", "watch", "tally", "ds_config"],
    ["volume", "cache", "lessons"],
    ["towers"],
    ["words", "pretrained"],
    ["shards"],
    ["data", "vision", "qformer", "language", "losses", "arms", "scoring", "guards", "share", "bootstrap"],
    ["contrast"],
    ["model", "ledger"],
    ["optim", "checkpoint"],
    ["preview", "progress"],
    ["inference", "failure"],
    ["metrics", "answers", "baselines", "pictures", "figures", "references", "report_page", "explain", "asking"],
    ["analysis", "methods"],
    ["report"],
    ["validation", "vqa"],
    ["ask", "evaluate", "compare", "serve", "export", "plan", "fetch"],
    ["demo", "doctor"],
    ["cli", "__init__", "__main__"],
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}

# These libraries are imported nowhere else (tests and benchmarks apart).
FENCES = {
    "deepspeed": ["train.py", "medblip/distributed.py", "medblip/checkpoint.py"],
    "webdataset": ["sharding/"],
    "nibabel": ["medblip/image.py", "medblip/explain.py", "sharding/"],
    "pydicom": ["medblip/dicom.py", "sharding/"],
    "fsspec": ["medblip/remote.py"],
}

CORE_STORY = ["medblip/config.py", "train.py", "medblip/data.py", "medblip/model.py"]
CORE_STORY_MAX_LINES = 1050

SOURCES = sorted([ROOT / "train.py", *ROOT.glob("medblip/**/*.py"), *ROOT.glob("sharding/**/*.py")])
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path) -> set[str]:
    """Dotted names that a file imports, at its top or inside functions; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, from the package's name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path) -> set[str]:
    """The modules of medblip that a file imports."""
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("medblip.")}
    return {part for part in parts if (ROOT / "medblip" / f"{part}.py").exists()}


@every_source
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    if package == "sharding":
        assert own_modules(path) <= {"volume", "text"}, "sharding may use medblip.volume and medblip.text only"
    if package == "medblip":
        assert not any(name.split(".")[0] in ("sharding", "train") for name in imported(path))
        assert path.stem in ROW, f"give {path.stem} a row in LAYERS of tests/test_layout.py, below all that it imports"
        wrong = sorted(name for name in own_modules(path) if ROW.get(name, 0) >= ROW[path.stem])
        assert not wrong, f"{path.stem} may not import {wrong}: see LAYERS in tests/test_layout.py"


@every_source
def test_libraries_stay_behind_their_fences(path):
    where = path.relative_to(ROOT).as_posix()
    for library, allowed in FENCES.items():
        if any(name.split(".")[0] == library for name in imported(path)):
            assert where.startswith(tuple(allowed)), f"{library} is imported only in {', '.join(allowed)}"


@every_source
def test_whatever_is_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    tops = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [node for node in tops if node.name[0] != "_" and node.name != "main"]  # main: see the module's docstring
    missing = [f"{node.name} (line {node.lineno})" for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and not missing, f"no docstring: {missing or 'the module'}"


def test_core_story_fits_in_an_hour_of_reading():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in CORE_STORY}
    assert sum(lines.values()) <= CORE_STORY_MAX_LINES, lines


def test_no_file_names_a_folder_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    somebodys = re.compile(r"(?<![\w.:/-])/(?:work|root|home/\w+)(?:/|\b)")
    found = []
    for name in listed.stdout.splitlines():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            found += [f"{name}: {line}" for line in data.decode().splitlines() if somebodys.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "command",
    [
        "-c 'from medblip.cli import main; main()'",
        "-m sharding.manifest",
        "-m sharding.build",
        "-m sharding.verify",
        "-m sharding.quality",
        "train.py",
    ],
)
def test_help_answers_at_once(command):
    """Under half a second of a quiet machine's time; twice that is allowed here."""

    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *shlex.split(command), "--help"], cwd=ROOT, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stdout + done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(cpu_s() for _ in range(3)) < 1.0
