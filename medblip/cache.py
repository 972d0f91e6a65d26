"""Whole shards from elsewhere in a folder of this node, kept to a size and shared by all its processes.

A shard lies under its sha256, so that any run and any URL finds it. `Cache.open`:

1. It is there: it is opened and, while it is open, locked against removal.
2. It is not: whoever gets the lock on its temporary file fetches it, the others wait.
3. Room is made first: shards that nobody has open are removed, those opened longest ago first.
4. The bytes are counted and hashed; only then does the file get its name.

The locks are flock's and end with their process, however it ends. What it left unfinished is taken over or removed.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from medblip.distributed import locked, log
from medblip.remote import Remote, Stopped

GB = 10**9
POLL_S = 0.1
ROOM_WAIT_S = 600.0


class Cache:
    """The folder `MEDBLIP_CACHE` (default: `medblip-cache-UID` in the folder for temporary files), its owner's alone.

    It is kept to `MEDBLIP_CACHE_GB` (default: half of the disk that it lies on).

    Raises:
        ValueError: if the folder cannot be made or is another user's, or the size is no number above 0.
    """

    def __init__(self):
        default = f"{tempfile.gettempdir()}/medblip-cache-{os.getuid()}"
        self.folder = Path(os.environ.get("MEDBLIP_CACHE", default)).expanduser()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the shard cache {self.folder}: {error.strerror}; set MEDBLIP_CACHE") from None
        if os.getuid() not in (0, self.folder.stat().st_uid):
            raise ValueError(f"the shard cache {self.folder} belongs to another user; set MEDBLIP_CACHE")
        given = os.environ.get("MEDBLIP_CACHE_GB", str(shutil.disk_usage(self.folder).total / 2 / GB))
        try:
            self.limit_bytes = int(float(given) * GB)
        except ValueError:
            self.limit_bytes = 0
        if self.limit_bytes <= 0:
            raise ValueError(f"MEDBLIP_CACHE_GB={given} must be a number above 0")

    def check_fits(self, needed_bytes: int) -> None:
        """Refuses shards that do not fit together.

        Raises:
            ValueError: saying how much is needed.
        """
        if needed_bytes > self.limit_bytes:
            raise ValueError(
                f"the shard cache {self.folder} may hold {self.limit_bytes / GB:.4g} GB, but the shards in use and the "
                f"next ones are {needed_bytes / GB:.4g} GB; {_more_room(needed_bytes)}"
            )

    def open(self, remote: Remote, name: str, size: int, sha256: str, stop: threading.Event) -> int:
        """A file descriptor of the shard `name`, fetched if it is not here yet; closing it allows its removal.

        Raises:
            ValueError: if it cannot be fetched, is not what the index says, or finds no room.
            Stopped: soon after `stop` was set.
        """
        path, temporary = self.folder / f"{sha256}.tar", self.folder / f".{sha256}.part"
        while not stop.is_set():
            file = _open_kept(path)
            if file is not None:
                return file
            file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not _lock_at_once(file, temporary):
                    time.sleep(POLL_S)  # another process or thread fetches it
                elif path.exists():
                    temporary.unlink()
                else:
                    self._fetch(remote, name, size, sha256, file, stop)
                    os.replace(temporary, path)
            finally:
                os.close(file)
        raise Stopped

    def _fetch(self, remote: Remote, name: str, size: int, sha256: str, file: int, stop: threading.Event) -> None:
        url, temporary = f"{remote.url}/{name}", self.folder / f".{sha256}.part"
        try:
            self._make_room(file, size, stop)
            found = remote.fetch(name, size, file, stop)
            if found != sha256:
                log.warning("%s: bytes were altered on the way (sha256 %s, not %s); fetching again", url, found, sha256)
                found = remote.fetch(name, size, file, stop)
            if found != sha256:
                raise ValueError(
                    f"{url} is damaged: sha256 {found} twice, where index.json says {sha256}; run python -m "
                    "sharding.verify on the folder it was copied from, and copy the shard again"
                )
            os.fsync(file)
        except BaseException:
            temporary.unlink()
            raise

    def _make_room(self, file: int, size: int, stop: threading.Event) -> None:
        """Gives the open temporary file its size; waits for shards in use elsewhere to be closed."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while not self._reserve(file, size):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the shard cache {self.folder} is full of shards that running jobs read; "
                    f"{_more_room(self.limit_bytes + size)}"
                )
            if stop.wait(POLL_S):
                raise Stopped

    def _reserve(self, file: int, size: int) -> bool:
        with locked(self.folder / ".lock"):
            kept = self._kept(besides=os.fstat(file).st_ino)
            used = sum(each for _, each, _ in kept)
            for _, each, path in kept:
                if used + size <= self.limit_bytes:
                    break
                if _remove_unless_held(path):
                    used -= each
            if used + size > self.limit_bytes:
                return False
            os.ftruncate(file, 0)
            try:
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                raise ValueError(f"the shard cache {self.folder}: {error.strerror}; set MEDBLIP_CACHE") from None
            return True

    def _kept(self, besides: int) -> list[tuple[float, int, Path]]:
        """When opened, size and path of the shards here and on their way, the one opened longest ago first."""
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                with suppress(FileNotFoundError):  # another process just renamed or removed it
                    stat = path.stat()
                    found += [(stat.st_mtime, stat.st_size, path)] if stat.st_ino != besides else []
        return sorted(found)


def _open_kept(path: Path) -> int | None:
    """Opens a shard that is here and keeps it from being removed; None if it is not here."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file).st_nlink == 0:  # removed before it was locked
        os.close(file)
        return None
    os.utime(file, ns=(time.time_ns(),) * 2)  # finer than the clock that files get by themselves
    return file


def _lock_at_once(file: int, path: Path) -> bool:
    """Locks an open file for writing; False if it is locked already, or no longer the one at `path`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(path).st_ino == os.fstat(file).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_unless_held(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    removed = _lock_at_once(file, path)
    if removed:
        path.unlink()
    os.close(file)
    return removed


def _more_room(needed_bytes: int) -> str:
    needed = math.ceil(needed_bytes / GB * 1000) / 1000
    return f"set MEDBLIP_CACHE_GB to at least {needed:g}, or MEDBLIP_CACHE to a folder on a larger disk"
