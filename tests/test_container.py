"""The Apptainer recipe of slurm/: what can be tested of it without Apptainer, a registry of images and a GPU."""

import os
import re
import subprocess
import sys

from conftest import ROOT, require_tool

from medblip import __version__

RECIPE = (ROOT / "slurm/medblip.def").read_text()
_, *PARTS = re.split(r"^%(\w+)\n", RECIPE, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
ARGUMENTS = dict(line.strip().split("=", 1) for line in SECTIONS["arguments"].splitlines() if line.strip())
# As Apptainer fills the arguments in.
POST = re.sub(r"{{ (\w+) }}", lambda match: ARGUMENTS[match[1]], SECTIONS["post"])


def test_every_build_argument_has_a_default():
    named = re.findall(r"--build-arg (\w+)=|{{ (\w+) }}", RECIPE)
    assert {name for pair in named for name in pair if name} == ARGUMENTS.keys()
    assert "{{" not in POST


def test_its_files_are_in_the_repository():
    for line in filter(str.strip, SECTIONS["files"].splitlines()):
        assert (ROOT / line.split()[0]).is_file(), line


def test_its_scripts_pass_shellcheck(tmp_path):
    shellcheck = require_tool("shellcheck", "apt-get install shellcheck")
    scripts = {"post": POST, "environment": SECTIONS["environment"], "test": SECTIONS["test"]}
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        checked = subprocess.run([shellcheck, tmp_path / name], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_it_installs_extras_that_setup_py_has():
    setup = (ROOT / "setup.py").read_text()
    (extras,) = re.findall(r'"\.\[(.*?)\]"', POST)
    assert all(f'"{extra}": ' in setup for extra in extras.split(","))


def test_medblip_in_the_container_is_the_code_of_the_folder_it_is_called_from(tmp_path):
    (made,) = re.findall(r"^ *printf .*? >/opt/venv/bin/medblip$", POST, flags=re.MULTILINE)
    program = tmp_path / "medblip"
    script = made.replace("/opt/venv/bin/medblip", str(program)).replace("/opt/venv/bin/python", sys.executable)
    subprocess.run(["sh", "-c", script], check=True)
    program.chmod(0o755)
    other = tmp_path / "checkout/medblip"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (other / "cli.py").write_text("import sys\nprint('the other checkout', sys.argv[1:])\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def says(folder, *words) -> str:
        return subprocess.check_output([program, *words], cwd=folder, env=environment, text=True)

    assert __version__ in says(ROOT, "--version")
    assert says(other.parent, "two words") == "the other checkout ['two words']\n"
