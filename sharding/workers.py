"""Processes that pack shards: each takes one at a time, says what it has in hand, and dies with its parent."""

import logging
import os
import signal
import sys
import time
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread

from tqdm import tqdm

from sharding.shard import Shard

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class WorkerDied(RuntimeError):
    """A worker process ended by itself; the message names the scan it had in hand."""


def pack_all(out: Path, shards: list[Shard], recipe, codec: str, workers: int) -> None:
    """Packs the shards with `workers` processes.

    Raises:
        WorkerDied: the other workers are ended as well; shards that are complete stay.
    """
    # Workers are forked from a small server that has imported the libraries once, not from this process, whose
    # threads a fork would lose. The server outlives this process as long as they do, so they watch it themselves.
    context = get_context("forkserver")
    context.set_forkserver_preload(["sharding.pack"])
    todo = iter(shards)
    processes: dict[Connection, object] = {}
    in_hand: dict[Connection, tuple[Shard, str | None]] = {}  # shard and scan of every busy worker
    progress = _Progress(sum(len(shard.scans) for shard in shards))
    try:
        for _, shard in zip(range(workers), todo, strict=False):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs, out, recipe, codec), daemon=True)
            processes[ours].start()
            theirs.close()
            ours.send(shard)
            in_hand[ours] = (shard, None)
        while in_hand:
            for pipe in wait(list(in_hand)):
                shard, scan = in_hand[pipe]
                try:
                    started = pipe.recv()
                    if scan is not None:
                        progress.one_more()
                    if started is not None:
                        in_hand[pipe] = (shard, started)
                        continue
                    del in_hand[pipe]
                    following = next(todo, None)
                    pipe.send(following)
                    if following is not None:
                        in_hand[pipe] = (following, None)
                except (EOFError, OSError):
                    raise WorkerDied(_obituary(processes[pipe], shard, scan)) from None
    except BaseException:
        for process in processes.values():
            process.terminate()
        raise
    finally:
        progress.close()
        for process in processes.values():
            process.join()


def _obituary(process, shard: Shard, scan: str | None) -> str:
    process.join(5)
    scan = "before its first scan" if scan is None else f"with scan {scan!r} in hand"
    return (
        f"a worker died (exit code {process.exitcode}) {scan}, shard {shard.name}; complete shards are kept and the "
        "same command goes on. If memory ran out (exit code -9), give fewer --workers; if it is the scan, leave it out"
    )


def _work(pipe: Connection, out: Path, recipe, codec: str) -> None:
    """A worker: packs the shards it is sent, telling each scan it starts and, with None, each shard it ends."""
    import torch

    from sharding.pack import pack_shard

    Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    torch.set_num_threads(1)
    for shard in iter(pipe.recv, None):
        pack_shard(out, shard, recipe, codec, starting=lambda scan: pipe.send(scan.scan_id))
        pipe.send(None)


def _die_with_parent() -> None:
    """Ends this process, whatever it is doing, as soon as the build's own process is gone."""
    wait([parent_process().sentinel])
    os._exit(1)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started_at = self.told_at = time.monotonic()
        self.bar = tqdm(total=total, unit="scan", disable=not sys.stderr.isatty() or total == 0)

    def one_more(self) -> None:
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.told_at > SECONDS_BETWEEN_LINES:
            self.told_at = now
            left_s = (now - self.started_at) / self.done * (self.total - self.done)
            log.info("%d of %d scans, about %.0f min left", self.done, self.total, left_s / 60)

    def close(self) -> None:
        self.bar.close()
