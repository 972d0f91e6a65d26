"""Files behind a URL, through fsspec: https, http, s3 and whatever else it has a library for.

A small file is read at once. A shard is fetched block by block: a cut connection goes on from where it was by a range
request, or from the start where the server has no ranges; what fails again and again, or for good, is an error that
names URL and cause. Nothing that is raised or logged here holds a password, token or signature.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading

from medblip.distributed import log

BLOCK_BYTES = 16 << 20
SHARD_TRIES, INDEX_TRIES = 8, 3
"""Tries in a row that bring nothing new. The waits between a shard's eight add up to two minutes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Stopped(Exception):
    """Nobody wants the file any more."""


class WrongSize(ValueError):
    """The file has another size than index.json says."""


class Remote:
    """A folder behind a URL.

    Raises:
        ValueError: for a URL with a password or a query, a kind of URL that nobody knows, or a missing library.
    """

    def __init__(self, url: str):
        if re.search(r"//[^/]*@", url) or "?" in url:
            raise ValueError(
                f"{without_secrets(url)}: leave passwords and tokens out of the URL, which is written into the run's "
                "files; they belong in ~/.netrc (https), ~/.aws or AWS_* variables (s3)"
            )
        import fsspec

        self.url = url.rstrip("/")
        kind, options = url.partition("://")[0], {}
        try:
            if kind in ("http", "https"):
                import aiohttp

                # Proxies and ~/.netrc count. Silence has a limit, a slow connection has none.
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
                options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
            self._files = fsspec.filesystem(kind, **options)
        except ImportError:
            raise ValueError(f"{url}: reading {kind} needs more libraries: pip install 'medblip[remote]'") from None

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            ValueError: if it cannot be fetched.
        """
        url, wait_s = f"{self.url}/{name}", FIRST_WAIT_S
        for attempt in range(1, INDEX_TRIES + 1):
            try:
                return self._files.cat_file(url)
            except Exception as error:  # whatever the library behind the URL raises
                error = _real(error)
                if _is_final(error) or attempt == INDEX_TRIES:
                    raise ValueError(_failed(url, error)) from None
                _wait(wait_s, threading.Event())
                wait_s *= 2

    def fetch(self, name: str, size: int, file: int, stop: threading.Event) -> str:
        """Fetches a file of `size` bytes into an open one and returns its sha256 in hex.

        Raises:
            ValueError: if it cannot be fetched.
            WrongSize: if it has another size.
            Stopped: soon after `stop` was set.
        """
        url, block_bytes = f"{self.url}/{name}", BLOCK_BYTES
        done, farthest, tries, wait_s, digest = 0, -1, 0, FIRST_WAIT_S, hashlib.sha256()
        while done < size:
            try:
                with self._files.open(url, "rb", block_size=block_bytes, cache_type="none") as remote:
                    if remote.size not in (None, size):
                        raise WrongSize(f"{url}: {remote.size} where index.json says {size} bytes")
                    if done and not _goes_on(remote, done):
                        done, digest = 0, hashlib.sha256()
                    while done < size:
                        block = remote.read(min(BLOCK_BYTES, size - done))
                        if not block:
                            raise ConnectionError("the connection ended early")
                        written = os.pwrite(file, block, done)
                        assert written == len(block)
                        digest.update(block)
                        done += written
                        _wait(0, stop)
            except (Stopped, WrongSize):
                raise
            except Exception as error:  # whatever the library behind the URL raises
                if isinstance(error, ValueError) and block_bytes:
                    block_bytes = 0  # fsspec found that the server has no ranges; 0 is its word for one stream
                    continue
                error = _real(error)
                tries, wait_s = (1, FIRST_WAIT_S) if done > farthest else (tries + 1, min(2 * wait_s, LONGEST_WAIT_S))
                farthest = max(farthest, done)
                if _is_final(error) or tries == SHARD_TRIES:
                    raise ValueError(_failed(url, error)) from None
                log.warning("%s: %s after %d of %d bytes; again in %g s", url, _cause(error), done, size, wait_s)
                _wait(wait_s, stop)
        return digest.hexdigest()


def without_secrets(text: str) -> str:
    """A text with the user part and the query of every URL in it taken out."""
    return re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^/@\s'\"]*@", "//", text))


def _goes_on(remote, done: int) -> bool:
    try:
        remote.seek(done)
    except ValueError:  # one stream, from the start
        return False
    return True


def _wait(seconds: float, stop: threading.Event) -> None:
    if stop.wait(seconds):
        raise Stopped


def _real(error: Exception) -> Exception:
    """What went wrong: fsspec reports whatever happens to a HEAD request as a missing file."""
    cause = error.__cause__
    of_the_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and of_the_network else error


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: nothing there, not allowed, the disk here is full."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return refused or full or isinstance(error, FileNotFoundError | PermissionError)


def _cause(error: Exception) -> str:
    return without_secrets(f"{type(error).__name__} {error}".strip())


def _failed(url: str, error: Exception) -> str:
    return f"{url} cannot be fetched: {_cause(error)}; check the address, the network and your rights, then run again"
