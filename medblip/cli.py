"""The command `medblip`: reads the options, runs one subcommand, turns errors into messages and exit codes.

Exit codes: 0 done, 1 the data or the run failed, 2 wrong usage. stdout is the result, stderr the log.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated, Union

import tyro

from medblip import __version__
from medblip.ask import AskOptions, ask
from medblip.compare import CompareOptions, compare
from medblip.demo import DemoOptions, demo
from medblip.doctor import DoctorOptions, doctor
from medblip.evaluate import EvaluateOptions, evaluate
from medblip.fetch import FetchOptions, fetch
from medblip.ledger import LedgerOptions, ledger
from medblip.plan import PlanOptions, plan

DESCRIPTION = """MedBLIP reads a 3-D brain MRI with the text of a health record and answers in words.

Train with train.py, pack scans with `python -m sharding.build`; `medblip --version` prints the version.
"""

COMMANDS = {
    EvaluateOptions: evaluate,
    CompareOptions: compare,
    AskOptions: ask,
    FetchOptions: fetch,
    PlanOptions: plan,
    LedgerOptions: ledger,
    DoctorOptions: doctor,
    DemoOptions: demo,
}

OneCommand = Union[  # noqa: UP007 - made from COMMANDS
    tuple(
        Annotated[options, tyro.conf.subcommand(command.__name__, description=inspect.cleandoc(options.__doc__))]
        for options, command in COMMANDS.items()
    )
]


def main() -> int:
    """Runs one subcommand and returns its exit code; tyro itself leaves with 2 on wrong usage."""
    if sys.argv[1:] == ["--version"]:
        print(f"medblip {__version__}")
        return 0
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # deepspeed's; see RANK
    options = tyro.cli(OneCommand, args=arguments, prog="medblip", description=DESCRIPTION)
    from medblip.distributed import log_to_stderr

    log_to_stderr(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    try:
        return COMMANDS[type(options)](options)
    except (ValueError, OSError) as error:
        print(f"medblip: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
