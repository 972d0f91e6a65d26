"""Processes that pack shards: each takes one at a time, says what it has in hand, and dies with its parent.

A worker that dies leaves its shard to a fresh one. If the same scan ends a second worker, the cause decides: a crash
(SIGSEGV, SIGABRT, an exit code) is the scan's, which is set aside; a kill (out of memory, or someone's hand) says
nothing about the scan, and its shard is tried once more at the end, with no other worker beside it.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import NamedTuple

from tqdm import tqdm

from sharding.shard import Packing, Shard

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
RECENT_S = 180.0  # the speed that the time left is told from
SLOW_SCAN_S = 300.0
OUT_OF_MEMORY = 137  # what a shell shows for a process that was killed for its memory
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
KILLED = (-signal.SIGKILL, -signal.SIGTERM, OUT_OF_MEMORY)


class WorkerDied(RuntimeError):
    """A scan or a shard ended every worker that had it in hand; the message names it."""


class _Told(NamedTuple):
    """What a worker says of the shard that it has in hand."""

    scan: str | None
    """The scan it starts; None once all are read."""
    num_done: int
    num_aside: int
    is_complete: bool


@dataclass
class _Job:
    shard: Shard
    deaths: Counter[str | None] = field(default_factory=Counter)
    """How many workers ended with which scan in hand."""
    deadly: dict[str, str] = field(default_factory=dict)
    """Scans that are set aside for it, and why."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: _Job
    told: _Told = _Told(None, 0, 0, False)
    told_at: float = field(default_factory=time.monotonic)
    is_warned: bool = False


def pack_all(packing: Packing, shards: list[Shard], num_workers: int, progress: "Progress") -> None:
    """Packs the shards with `num_workers` processes.

    Raises:
        WorkerDied: a worker was killed again and again at one place; shards that are complete stay.
        OSError: `packing.out` cannot be written.
    """
    killed = _run(packing, [_Job(shard) for shard in shards], num_workers, progress)
    for job in killed:
        if _run(packing, [job], 1, progress):
            raise WorkerDied(
                f"workers were killed again and again {_place(job, _most_deadly(job))}, at last with no other beside "
                "them. What else there was is packed, and the same command goes on. If memory ran out (exit status "
                f"{OUT_OF_MEMORY}), ask for more or give fewer --workers; if it is the scan, take its row out"
            )


def _run(packing: Packing, jobs: list[_Job], num_workers: int, progress: "Progress") -> list[_Job]:
    """Packs what it can and returns the jobs whose workers were killed twice with the same scan in hand."""
    # Workers are forked from a small server that has imported the libraries once, not from this process, whose
    # threads a fork would lose. The server outlives this process as long as they do, so they watch it themselves.
    context = get_context("forkserver")
    context.set_forkserver_preload(["sharding.pack"])
    todo, killed = deque(jobs), []
    workers: dict[Connection, _Worker] = {}
    try:
        while todo or workers:
            while todo and len(workers) < num_workers:
                worker = _start(context, packing, todo.popleft())
                workers[worker.pipe] = worker
            for pipe in wait(list(workers), timeout=1.0):
                worker = workers[pipe]
                try:
                    _hear(worker, todo, progress)
                except _CannotWrite:
                    raise
                except (EOFError, OSError):  # it is gone, perhaps in the middle of a message
                    del workers[pipe]
                    (todo.appendleft if _can_go_on(worker) else killed.append)(worker.job)
                if worker.job is None:
                    workers.pop(pipe).process.join()
            progress.show([worker.told for worker in workers.values()])
            _warn_of_slow_scans(workers.values())
    except BaseException:
        for worker in workers.values():
            worker.process.terminate()
        raise
    finally:
        for worker in workers.values():
            worker.process.join()
    return killed


def _start(context, packing: Packing, job: _Job) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, packing), daemon=True)
    try:
        process.start()
    except (EOFError, ConnectionError):  # the server was killed a moment ago; the next call starts another
        time.sleep(0.5)
        process.start()
    theirs.close()
    ours.send((job.shard, job.deadly))
    return _Worker(process, ours, job)


def _hear(worker: _Worker, todo: deque[_Job], progress: "Progress") -> None:
    """Takes a worker's message, and gives it the next shard, if there is one, when it has done one."""
    message = worker.pipe.recv()
    if isinstance(message, OSError):
        raise _CannotWrite(message)
    worker.told, worker.told_at, worker.is_warned = message, time.monotonic(), False
    if message.is_complete:
        progress.add(message.num_done, message.num_aside)
        worker.told = _Told(None, 0, 0, False)
        worker.job = todo.popleft() if todo else None
        if worker.job is None:
            worker.pipe.close()  # which ends it
        else:
            worker.pipe.send((worker.job.shard, worker.job.deadly))


class _CannotWrite(OSError):
    """The worker's error, kept apart from those of the pipe to it."""

    def __init__(self, error: OSError):
        super().__init__(error.errno, error.strerror, error.filename)


def _can_go_on(worker: _Worker) -> bool:
    """Whether the shard of a dead worker can be given to the next one, and with which scan set aside."""
    job, scan = worker.job, worker.told.scan
    worker.process.join(5)
    code = worker.process.exitcode
    cause = f"exit code {code}" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"
    if code in (-signal.SIGKILL, OUT_OF_MEMORY):
        cause += ": out of memory?"
    job.deaths[scan] += 1
    if job.deaths[scan] == 1:
        log.warning("a worker died (%s) %s; a fresh one tries again", cause, _place(job, scan))
    elif code in KILLED or scan is None:
        log.warning("a second worker died (%s) %s; it is left for the end", cause, _place(job, scan))
        return False
    else:
        job.deadly[scan] = f"ends every process that reads it ({cause})"
        log.warning("a second worker died (%s) %s; the scan is set aside", cause, _place(job, scan))
    return True


def _most_deadly(job: _Job) -> str | None:
    return job.deaths.most_common(1)[0][0]


def _place(job: _Job, scan: str | None) -> str:
    return f"with scan {scan!r} in hand, shard {job.shard.name}" if scan else f"at shard {job.shard.name}"


def _warn_of_slow_scans(workers) -> None:
    for worker in workers:
        if worker.told.scan is not None and not worker.is_warned:
            elapsed_s = time.monotonic() - worker.told_at
            if elapsed_s > SLOW_SCAN_S:
                worker.is_warned = True
                log.warning("scan %r has been read for %.0f min; is its disk there?", worker.told.scan, elapsed_s / 60)


def _work(pipe: Connection, packing: Packing) -> None:
    """A worker: packs the shards it is sent and tells each scan it starts and each shard it ends."""
    import torch

    from sharding.pack import pack_shard

    Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    torch.set_num_threads(1)
    keep_memory()
    while True:
        try:
            shard, deadly = pipe.recv()
        except EOFError:
            return
        try:
            num_aside = pack_shard(packing, shard, deadly, lambda *told: pipe.send(_Told(*told, is_complete=False)))
        except MemoryError as error:
            print(f"memory ran out: {error}", file=sys.stderr, flush=True)
            os._exit(OUT_OF_MEMORY)
        except OSError as error:
            pipe.send(error)
            os._exit(1)  # leaving in order would try to write the rest of the tar once more
        pipe.send(_Told(None, len(shard.scans), num_aside, is_complete=True))


def keep_memory() -> None:
    """Has glibc keep the memory of one scan for the next: else the kernel maps and clears it anew, a third of the time.

    Elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _die_with_parent() -> None:
    """Ends this process, whatever it is doing, as soon as the build's own process is gone."""
    wait([parent_process().sentinel])
    os._exit(1)


class Progress:
    """A bar on a terminal, a line now and then elsewhere: scans done, set aside, recent speed, time left.

    `num_done` and `num_aside` are of shards that were there before; they do not count into the speed.
    """

    def __init__(self, total: int, num_done: int, num_aside: int):
        self.total, self.num_done, self.num_aside = total, num_done, num_aside
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), num_done)])
        self._told_at = time.monotonic()
        is_quiet = not sys.stderr.isatty() or num_done == total
        self._bar = tqdm(total=total, initial=num_done, disable=is_quiet, bar_format="{l_bar}{bar}|{postfix}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, num_done: int, num_aside: int) -> None:
        """Counts the scans of a shard that is complete now."""
        self.num_done += num_done
        self.num_aside += num_aside

    def show(self, in_hand: list[_Told]) -> None:
        """Shows how far it is, the shards in hand included."""
        now = time.monotonic()
        if now - self._recent[-1][0] < 1:
            return
        num_done = self.num_done + sum(told.num_done for told in in_hand)
        num_aside = self.num_aside + sum(told.num_aside for told in in_hand)
        self._recent.append((now, num_done))
        while now - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        text = self._text(num_done, num_aside)
        if not self._bar.disable:
            self._bar.n = num_done
            self._bar.set_postfix_str(text)
        elif now - self._told_at > SECONDS_BETWEEN_LINES:
            self._told_at = now
            log.info("%s", text)

    def _text(self, num_done: int, num_aside: int) -> str:
        (began_at, num_then), (now, _) = self._recent[0], self._recent[-1]
        scans_per_s = (num_done - num_then) / (now - began_at)
        aside = f" ({num_aside:,} set aside)" if num_aside else ""
        text = f"{num_done:,} of {self.total:,} scans{aside}"
        if scans_per_s <= 0:
            return text
        left_s = (self.total - num_done) / scans_per_s
        left = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min" if left_s < 5400 else _hours(left_s)
        return f"{text}, {scans_per_s:.3g} scans/s, about {left} left"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"
