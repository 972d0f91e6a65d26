"""Runs train.py, then writes the fingerprints of the frozen towers as this rank's engine holds them.

With STOP_AFTER=N in the environment, the run gets a SIGTERM after N steps.
"""

import json
import os
import signal
import sys
from pathlib import Path

import train

engines = []
real_step = train.train_step


def watched_step(parts, *rest):
    engines.append(parts.engine)
    losses = real_step(parts, *rest)
    if len(engines) == int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return losses


train.train_step = watched_step
code = train.main()
if code == 0:
    import deepspeed

    model = engines[0].module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        fingerprints = json.dumps(model.frozen_fingerprints())
    run = Path(sys.argv[sys.argv.index("--run") + 1])
    (run / f"frozen-rank{os.environ['RANK']}.json").write_text(fingerprints)
raise SystemExit(code)
