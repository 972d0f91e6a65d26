"""What the real launchers start in place of train.py: the same, observed, with the fault of this start.

FAULTS_FOLDER is where this start's notes go, FAULTS_FAULT the fault in JSON, or empty.
"""

import os
import sys
from pathlib import Path

import train
from faults.inject import Fault, before, install, observe

rank, folder = int(os.environ["RANK"]), Path(os.environ["FAULTS_FOLDER"])
(folder / f".pid-{rank}").write_text(str(os.getpid()))
os.replace(folder / f".pid-{rank}", folder / f"pid-{rank}")


def note(code: int) -> None:
    (folder / f"code-{rank}").write_text(str(code))


before(os, "_exit", note)
observe(rank, folder)
if os.environ["FAULTS_FAULT"]:
    install(Fault.from_json(os.environ["FAULTS_FAULT"]), rank, folder)
code = train.main()
note(code)
sys.exit(code)
