"""Which build may write which shard: one record of `.parts/lock` for each shard, record 0 for everything else.

POSIX record locks end with their process, however it ends, hold between nodes on a shared file system, and let builds
of other shards pass. A record's text says who locked it last; only error messages read it.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECORD_BYTES = 96


class Busy(ValueError):
    """Another process holds a shard; the message names both."""


class Locks:
    """The locks of one folder of shards; leaving the context gives them back."""

    # A process loses its locks with the first of its descriptors of the file that it closes, so there is one only.
    def __init__(self, out: Path):
        self._out = out
        (out / ".parts").mkdir(parents=True, exist_ok=True)
        self._file = os.open(out / ".parts" / "lock", os.O_RDWR | os.O_CREAT, 0o666)

    def __enter__(self) -> "Locks":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def to_write(self, first: int, names: list[str]) -> None:
        """Takes the shards from number `first` on for this process alone.

        Raises:
            Busy: another process writes or reads one of them.
        """
        self._take(fcntl.LOCK_EX, first, names)
        me = f"process {os.getpid()} on {socket.gethostname()}"
        job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
        if job:
            task = os.environ.get("SLURM_ARRAY_TASK_ID")
            me += f", Slurm job {job}" + (f"_{task}" if task else "")
        record = me.encode()[:RECORD_BYTES].ljust(RECORD_BYTES)
        os.pwrite(self._file, record * len(names), RECORD_BYTES * (1 + first))

    def to_read(self, first: int, names: list[str]) -> None:
        """Keeps writers away from the shards, readers not; what this process had taken to write becomes readable.

        Raises:
            Busy: another process writes one of them.
        """
        self._take(fcntl.LOCK_SH, first, names)

    @contextmanager
    def tables(self) -> Iterator[None]:
        """Waits for its turn to write whatever is not a shard."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, RECORD_BYTES, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, RECORD_BYTES, 0)

    def _take(self, kind: int, first: int, names: list[str]) -> None:
        if not names or self._try(kind, first, len(names)):
            return
        for number, name in enumerate(names, start=first):
            if not self._try(kind, number, 1):
                holder = os.pread(self._file, RECORD_BYTES, RECORD_BYTES * (1 + number)).decode(errors="replace")
                raise Busy(
                    f"{self._out}: another build is writing {name} ({holder.strip() or 'unknown'}); wait for it, "
                    "or take another --out"
                )

    def _try(self, kind: int, first: int, count: int) -> bool:
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, RECORD_BYTES * count, RECORD_BYTES * (1 + first))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise ValueError(
                f"{self._out}: its file system has no file locks ({error.strerror}), which keep two builds apart; "
                "have it mounted with them (Lustre: -o flock)"
            ) from error
        return True
