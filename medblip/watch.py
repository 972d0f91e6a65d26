"""Notices a rank that died, hangs or failed, and says which, at which step, doing what.

Every rank writes a beat into the process group's store: that it lives, and what its main thread is doing. When its
main thread does not get on, or a collective fails because a peer is gone, a rank reads the others' beats, names the
culprit and ends. Clocks are never compared between nodes: a rank's beat is as old as the time since it last changed,
as seen from here.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import torch.distributed as dist

from medblip.distributed import Rank, log

RUN_ME_AGAIN = 86
"""Exit code of a rank that ends because another died or hangs: what is on the disk is good, start it again."""

SLOW_S = 1800.0
"""What loading the towers, the first step or a save may take, where the time-out is shorter."""


class Watch:
    """Watches this rank's main thread and the other ranks.

    Args:
        rank: this one.
        timeout_s: the longest that one thing (a micro-step, waiting for data, a save) may take.
    """

    def __init__(self, rank: Rank, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        self.every_s = min(1.0, timeout_s / 10)
        self._doing, self._step, self._count = "starting", 0, 0
        self._allowed_s = max(timeout_s, SLOW_S)
        self._since = time.monotonic()
        self._seen: dict[int, tuple[dict, float]] = {}
        self._looked_at = time.monotonic()
        self._closed = threading.Event()
        self._store = _own_store() if rank.world > 1 else None
        self._beat()
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def doing(self, what: str, step: int, is_slow: bool = False) -> None:
        """Says what the main thread does from now on, at which step (counted from 1), and if it may take SLOW_S."""
        self._doing, self._step, self._count = what, step, self._count + 1
        self._allowed_s = max(self.timeout_s, SLOW_S) if is_slow else self.timeout_s
        self._since = time.monotonic()

    @property
    def doing_now(self) -> str:
        """What the main thread does, in words."""
        return f"{self._doing} in step {self._step}" if self._step else self._doing

    def close(self) -> None:
        """Ends the watching, once all ranks have done everything."""
        self._closed.set()
        self._thread.join(3 * self.every_s)  # not for ever: rank 0, which is asked for the store, may be stopped

    def failed(self, reason: str, code: int) -> None:
        """Leaves word for the other ranks why this one ends, and with which code."""
        if self._store is None:
            return
        try:
            # The first word stands: the ranks that end because of it have nothing to add.
            self._store.compare_set("failed", "", json.dumps([self.rank.index, reason, code]))
        except RuntimeError:
            return  # the store's rank is gone: nobody to tell
        if self.rank.index == 0:
            time.sleep(3 * self.every_s)  # it serves the store: the others read the word before it goes

    def explain(self) -> tuple[str, int]:
        """Why a collective failed: a sentence naming the ranks that failed or are gone, and the code to end with."""
        try:
            self._look()
            time.sleep(4 * self.every_s)  # a living rank beats in this time
            self._look()
            if failure := self._failure():
                index, reason, code = failure
                return f"rank {index} failed: {reason}", code
        except RuntimeError:
            return self._store_gone(), RUN_ME_AGAIN
        gone = self._silent(3 * self.every_s)
        if not gone:
            return "the ranks lost each other, though all still live", RUN_ME_AGAIN
        return "; ".join(f"rank {index} is gone, {self._last(index)}" for index in gone), RUN_ME_AGAIN

    def _run(self) -> None:
        while not self._closed.wait(self.every_s):
            self._rounds += 1
            stuck_s = time.monotonic() - self._since
            is_looking = self._store is not None and stuck_s > min(self._allowed_s, self.timeout_s) / 2
            try:
                self._beat()
                self._obey_failure()
                if is_looking:
                    self._look()
            except RuntimeError:
                # A rank 0 that has done everything goes as well: leaves the main thread the time to close the watch.
                if stuck_s > 3 * self.every_s and not self._closed.wait(self.every_s):
                    self._end(self._store_gone())
                continue
            # A rank that beats no more is given no longer time, whatever is being done: its beat is a thread's.
            is_lost = is_looking and self._silent(self.timeout_s)
            if (stuck_s > self._allowed_s or is_lost) and not self._closed.is_set():
                self._end(self._culprit(stuck_s))

    def _obey_failure(self) -> None:
        """Ends with the reason and the code of a rank that has failed, so that all end alike."""
        failure = self._failure()
        if failure and failure[0] != self.rank.index and not self._closed.is_set():
            log.error("rank %d failed: %s; ending with code %d as well", *failure)
            os._exit(failure[2])

    def _failure(self) -> tuple[int, str, int] | None:
        """The rank that failed first, why, and its code; None as long as none did."""
        if self._store is None or not self._store.check(["failed"]):
            return None
        return tuple(json.loads(self._store.get("failed")))

    def _guard(self) -> None:
        """Ends this rank if the store, which is rank 0's, keeps the watch waiting for an answer: rank 0 is stopped.

        Counts its own ticks, so that a suspended job, whose clock went on, is not taken for a silent one.
        """
        rounds, ticks = 0, 0
        while not self._closed.wait(self.every_s):
            rounds, ticks = self._rounds, ticks + 1 if rounds == self._rounds else 0
            if ticks * self.every_s > self.timeout_s and not self._closed.is_set():
                doing = f"rank {self.rank.index} was {self.doing_now}"
                log.error("rank 0 does not respond; %s; ending with code %d: start it again", doing, RUN_ME_AGAIN)
                os._exit(RUN_ME_AGAIN)

    def _silent(self, seconds: float) -> list[int]:
        """Ranks whose beat has not changed for so long."""
        now = time.monotonic()
        return [index for index, (_, seen_at) in sorted(self._seen.items()) if now - seen_at > seconds]

    def _beat(self) -> None:
        if self._store is not None:
            now = [self._step, self._doing, self._count, time.monotonic(), socket.gethostname(), os.getpid()]
            self._store.set(f"beat/{self.rank.index}", json.dumps(now))

    def _look(self) -> None:
        """Reads every other rank's beat."""
        others = [index for index in range(self.rank.world) if index != self.rank.index]
        now = time.monotonic()
        if now - self._looked_at > 10 * self.every_s:
            self._seen = {}  # nobody has looked lately: how old a beat is is not known
        self._looked_at = now
        for index in others:
            if not self._store.check([f"beat/{index}"]):
                self._seen.setdefault(index, ([0, "starting", 0, 0.0, "an unknown host", 0], now))
                continue
            beat = json.loads(self._store.get(f"beat/{index}"))
            if index not in self._seen or self._seen[index][0] != beat:
                self._seen[index] = (beat, now)

    def _culprit(self, stuck_s: float) -> str:
        """The rank that the others wait for: one that beats no more, else the one that is furthest behind."""
        own = f"rank {self.rank.index} has been {self._doing} in step {self._step} for {stuck_s:.0f} s"
        if silent := self._silent(max(3.0, 4 * self.every_s)):
            return "; ".join(f"rank {index} does not respond, {self._last(index)}" for index in silent) + f"; {own}"
        behind = min(self._seen, key=lambda index: self._seen[index][0][2], default=None)
        if behind is not None and self._seen[behind][0][2] < self._count:
            return f"rank {behind} does not get on, {self._last(behind)}; {own}"
        return f"{own}, and does not get on"

    def _last(self, index: int) -> str:
        (step, doing, _, _, host, pid), _ = self._seen[index]
        return f"last seen in step {step}, {doing} ({host}, process {pid})"

    def _store_gone(self) -> str:
        where = f", {self._last(0)}" if 0 in self._seen else ""
        return f"rank 0 is gone: nothing answers at its address{where}; rank {self.rank.index} was {self._doing}"

    def _end(self, why: str) -> None:
        log.error("%s; ending with code %d: start it again, it goes on from the last checkpoint", why, RUN_ME_AGAIN)
        self.failed(why, RUN_ME_AGAIN)
        # The main thread may be in a collective that nothing ends: no clean-up can run.
        os._exit(RUN_ME_AGAIN)


def _own_store():
    # A connection of our own: the process group's may be in use by a thread that waits on it.
    return dist.PrefixStore("medblip_watch", dist.distributed_c10d._get_default_store().clone())
