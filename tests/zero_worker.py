"""Runs train.py, then writes the fingerprints of the frozen towers as this rank's engine holds them.

With STOP_AFTER=N in the environment, the run gets a SIGTERM after N steps. With SWAP_FROM_BYTES=N, NVMe offload swaps
parts from N bytes on (DeepSpeed's least is 1 MiB, which no weight of the tiny preset reaches), and no fingerprints are
written: gathering everything at once takes a buffer for each weight.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import train

engines = []
real_step = train.train_step


def watched_step(parts, *rest):
    engines.append(parts.engine)
    losses = real_step(parts, *rest)
    if len(engines) == int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
        while not parts.stopping.wanted:  # another thread takes note of it, and the next step may be faster
            time.sleep(0.001)
    return losses


train.train_step = watched_step
if "SWAP_FROM_BYTES" in os.environ:
    from deepspeed.runtime.swap_tensor import partitioned_param_swapper

    partitioned_param_swapper.MIN_AIO_BYTES = int(os.environ["SWAP_FROM_BYTES"])
code = train.main()
if code == 0 and "SWAP_FROM_BYTES" not in os.environ:
    import deepspeed

    model = engines[0].module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        fingerprints = json.dumps(model.frozen_fingerprints())
    run = Path(sys.argv[sys.argv.index("--run") + 1])
    (run / f"frozen-rank{os.environ['RANK']}.json").write_text(fingerprints)
raise SystemExit(code)
