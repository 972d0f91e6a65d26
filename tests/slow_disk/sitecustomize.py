"""A slow disk for the ranks of a job: with this folder on PYTHONPATH, every Python that starts runs this file.

SLOW_DISK names a folder of switches. As long as it holds `read`, each read of a shard takes so many seconds as stand in
it; as long as it holds `save`, no file of a checkpoint reaches the disk.
"""

import os
import time
from pathlib import Path

if switches := os.environ.get("SLOW_DISK"):
    real_fsync = os.fsync

    def slow(read):
        def slow_read(*arguments):
            switch = Path(switches) / "read"
            if switch.exists():
                time.sleep(float(switch.read_text()))
            return read(*arguments)

        return slow_read

    def slow_fsync(handle):
        while ".unfinished" in os.readlink(f"/proc/self/fd/{handle}") and (Path(switches) / "save").exists():
            time.sleep(0.1)
        return real_fsync(handle)

    os.pread, os.preadv, os.fsync = slow(os.pread), slow(os.preadv), slow_fsync
