"""Work shared among ranks, with the same results as on one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from medblip.distributed import Control, Rank

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crew:
    """The ranks that share an evaluation."""

    rank: Rank
    control: Control
    before_batch: Callable[[], None] = lambda: None
    """Called on all ranks at the same times; what it raises ends the work on all of them."""

    def share(
        self,
        batches: list[Batch],
        do: Callable[[Any], Result],
        read: Callable[[Batch], Any] = lambda batch: batch,
        what: str = "asking",
    ) -> list[Result]:
        """The result of each batch in order, on every rank; each rank does a run of them. A collective.

        Batches are cut before they are shared, so that a batch gives the same bits whoever does it. All ranks do
        equally many, a few of them twice: under ZeRO-3 each forward pass is a collective.

        Args:
            batches: the same on all ranks.
            do: makes the result out of what `read` gave for a batch.
            read: runs in a thread, one batch ahead.
            what: shown on a terminal.
        """
        from tqdm import tqdm

        size = -(-len(batches) // self.rank.world)
        mine = batches[self.rank.index * size : (self.rank.index + 1) * size]
        todo = mine + batches[: size - len(mine)]
        results = []
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            ahead = [pool.submit(read, batch) for batch in todo[:1]]
            hidden = not (self.rank.is_main and sys.stderr.isatty())
            for number in tqdm(range(len(todo)), desc=what, unit="batch", disable=hidden):
                ready = ahead.pop().result()
                ahead = [pool.submit(read, batch) for batch in todo[number + 1 : number + 2]]
                self.before_batch()
                results.append(do(ready))
        gathered = [result for some in self.control.gather(results[: len(mine)]) for result in some]
        assert len(gathered) == len(batches)
        return gathered
