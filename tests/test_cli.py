"""The command line as a user meets it: help, mistakes, exit codes."""

import subprocess
import sys

import pytest
from conftest import ROOT


def medblip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "medblip.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", [[], ["evaluate"], ["compare"], ["ask"], ["fetch"]], ids=str)
def test_help_has_examples_and_loads_no_heavy_library(command):
    program = (
        "import sys; from medblip.cli import main; sys.argv[0] = 'medblip'\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("usage: medblip") and "Examples:" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_option_names_the_nearest_and_exits_2():
    done = medblip("evaluate", "--model", "runs/x", "--data", "shards", "--splt", "test")
    assert done.returncode == 2 and done.stdout == ""
    assert "--splt" in done.stderr and "--split" in done.stderr.split("Perhaps you meant")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fetch", "--preset", "tinny"], "did you mean 'tiny'"),
        (["evaluate", "--model", "m", "--data", "d", "--bootstrap", "10"], "at least 1000"),
        (["compare", "one"], "2 to 26"),
        (["evaluate", "--model", "m", "--data", "d", "--arms", "image", "image"], "--arms"),
        (["ask", "scan.nii.gz", "--model", "m"], "QUESTION"),
        ([], "evaluate"),
    ],
    ids=str,
)
def test_wrong_usage_exits_2(arguments, told):
    done = medblip(*arguments)
    assert done.returncode == 2 and done.stdout == "" and told in done.stderr


def test_version_is_the_package_s():
    from medblip import __version__

    assert medblip("--version").stdout == f"medblip {__version__}\n"
