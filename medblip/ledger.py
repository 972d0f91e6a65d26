"""Which samples each rank trained on, step by step: written by the ranks, proved by `medblip ledger RUN`.

`ledger/START-RANK.bin` belongs to one rank from one start of the run on. It begins with a line of JSON: the layout
(step it starts at, rank, world, micro-batch, accumulation). Then one record per optimizer step: magic, step,
number of samples, their KEYs (8 bytes each, micro-batch by micro-batch), a checksum. A run that goes on is first cut
back to the checkpoint's step, so that every step that counts stands there once; `ledger/events.jsonl` has what was
cut, what was skipped and why, and is cut back alike.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from medblip import lines
from medblip.lines import Appender, read_records

log = logging.getLogger("medblip")

HEAD = struct.Struct("<4sIII")  # magic, step, number of KEYs, crc32 of the rest
MAGIC = b"step"


class Ledger:
    """One rank's account of its samples.

    Args:
        run: folder of the run.
        start: step that the run goes on from.
        layout: `rank`, `world`, `micro_batch`, `accumulation`.
    """

    def __init__(self, run: Path, start: int, layout: dict[str, int]):
        folder = run / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{start:08d}-{layout['rank']:05d}.bin"
        path.unlink(missing_ok=True)
        self._file = Appender(path)
        self._file.append(json.dumps({"start": start, **layout}).encode() + b"\n")
        self._events = Appender(folder / "events.jsonl") if layout["rank"] == 0 else None

    def step(self, step: int, keys: list[str]) -> None:
        """Writes down the samples of one optimizer step (counted from 1) of this rank, in their order."""
        self._file.append(_record(step, keys))

    def event(self, step: int, what: str, why: str, keys: list[str]) -> None:
        """On rank 0: something that a reader of the ledger must know about a step."""
        if self._events is not None:
            line = json.dumps({"step": step, "what": what, "why": why, "keys": keys}) + "\n"
            self._events.append(line.encode())

    def sync(self) -> None:
        """Brings it to the disk, as a checkpoint does."""
        for file in (self._file, self._events):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()


def cut_back(run: Path, step: int) -> int:
    """Removes what stands after a step from all ranks' files; rank 0 does it before the others write.

    Returns the number of steps that are done again, and notes it in events.jsonl. Warns if the step itself, of which
    there is a checkpoint, is not whole.
    """
    folder = run / "ledger"
    last = step
    world, ranks = 1, set()  # of the step itself
    for path in sorted(folder.glob("*.bin")):
        if not _layout(path):  # torn in its first line: it holds no step
            path.unlink()
            continue
        with open(path, "rb+") as file:
            end = len(file.readline())
            for record_step, _, record_end in _records(path):
                last = max(last, record_step)
                if record_step == step:
                    world, ranks = _layout(path)["world"], ranks | {_layout(path)["rank"]}
                end = record_end if record_step <= step else end
            file.truncate(end)
    if step and len(ranks) < world:
        log.warning("%s: step %d is not whole: damaged; what the run used before stays unproved", folder, step)
    events = folder / "events.jsonl"
    lines.cut_back(events, step)
    folder.mkdir(parents=True, exist_ok=True)
    with open(events, "a") as file:
        event = {"step": step, "what": "start", "steps_done_again": last - step}
        file.write(json.dumps(event) + "\n")
    return last - step


def read(run: Path) -> dict[int, list[str]]:
    """The KEYs of every global batch: step (from 1) -> KEYs in the order of the sample stream.

    Raises:
        ValueError: naming file and step if a step stands there twice in one rank's name, a rank is missing, or the
            files of a step disagree about the layout.
    """
    parts: dict[int, dict[int, tuple[dict, list[str]]]] = {}
    for path in sorted((run / "ledger").glob("*.bin")):
        layout = _layout(path)
        for step, keys, _ in _records(path):
            of_rank = parts.setdefault(step, {})
            if layout["rank"] in of_rank:
                raise ValueError(f"{path}: step {step} of rank {layout['rank']} stands in the ledger twice")
            of_rank[layout["rank"]] = (layout, keys)
    steps = {}
    for step, of_rank in sorted(parts.items()):
        worlds = {layout["world"] for layout, _ in of_rank.values()}
        if len(worlds) > 1 or set(of_rank) != set(range(max(worlds))):
            raise ValueError(f"{run}/ledger: step {step} has ranks {sorted(of_rank)} of {sorted(worlds)}")
        steps[step] = _in_order([of_rank[rank] for rank in sorted(of_rank)])
    return steps


def _in_order(ranks: list[tuple[dict, list[str]]]) -> list[str]:
    """From each rank's samples to the stream's order: micro-step by micro-step, rank by rank."""
    size, accumulation = ranks[0][0]["micro_batch"], ranks[0][0]["accumulation"]
    return [
        key for micro in range(accumulation) for _, keys in ranks for key in keys[micro * size : (micro + 1) * size]
    ]


def _layout(path: Path) -> dict[str, int]:
    with open(path, "rb") as file:
        try:
            return json.loads(file.readline())
        except ValueError:
            return {}


def _record(step: int, keys: list[str]) -> bytes:
    body = b"".join(bytes.fromhex(key) for key in keys)
    return HEAD.pack(MAGIC, step, len(keys), zlib.crc32(struct.pack("<I", step) + body)) + body


def _records(path: Path) -> Iterator[tuple[int, list[str], int]]:
    """(step, KEYs, where the record ends) of each whole record; stops at a torn one."""
    content = path.read_bytes()
    at = content.find(b"\n") + 1
    while at + HEAD.size <= len(content):
        magic, step, num_keys, crc = HEAD.unpack_from(content, at)
        body = content[at + HEAD.size : at + HEAD.size + 8 * num_keys]
        if magic != MAGIC or len(body) < 8 * num_keys or zlib.crc32(struct.pack("<I", step) + body) != crc:
            return
        at += HEAD.size + len(body)
        yield step, [body[i : i + 8].hex() for i in range(0, len(body), 8)], at


@dataclass(frozen=True, kw_only=True)
class LedgerOptions:
    """Prove from a run's ledger that every sample was used once per epoch, in the planned order.

    Examples:
      medblip ledger runs/x
      medblip ledger runs/x --data /other/place/shards --json
    """

    run: Positional[str]
    """Folder of the run."""
    data: str | None = None
    """Where the shards are now. Without it: where they were."""
    json: bool = False
    """Print the result as JSON."""


def ledger(options: LedgerOptions) -> int:
    """Prints what the ledger proves; returns 0 if every step used the planned samples, 1 if not."""
    result = compare(Path(options.run), options.data)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(_sentences(result))
    return 0 if not result["faults"] else 1


def compare(run: Path, data: str | None = None) -> dict[str, Any]:
    """Compares a run's ledger with the order that its seed, data and schedule give.

    Returns `steps`, `samples`, `epochs_complete` (each sample exactly once in each), `samples_of_epoch_in_hand`,
    `restarts`, `steps_done_again`, `skipped` (events) and `faults` (empty if all is as planned).

    Raises:
        ValueError: if the run has no ledger or config, or the data is not the run's.
    """
    from medblip.data import SampleStream
    from medblip.shards import ShardIndex

    try:
        config = json.loads((run / "config.json").read_text())
    except OSError:
        raise ValueError(f"{run}: not a run folder, it has no config.json") from None
    samples = ShardIndex(data or config["train"]["data"]).samples("train")
    stream = SampleStream([sample.shard for sample in samples], config["train"]["seed"])
    global_batch = config["schedule"]["global_batch"]
    steps, events, faults = read(run), read_records(run / "ledger" / "events.jsonl"), []
    if not steps:
        raise ValueError(f"{run}/ledger holds no step")
    done = max(steps)
    if missing := sorted(set(range(1, done + 1)) - set(steps)):
        faults.append(f"steps {_brief(missing)} are missing")
    times: dict[int, dict[str, int]] = {}
    for step, keys in steps.items():
        first = (step - 1) * global_batch
        places = [stream.at(position) for position in range(first, first + global_batch)]
        planned = [samples[index].key for _, index in places]
        if keys != planned:
            kind = "in another order" if sorted(keys) == sorted(planned) else "other samples"
            faults.append(f"step {step} used {kind} than planned")
        for key, (epoch, _) in zip(keys, places, strict=False):
            times.setdefault(epoch, {})[key] = times.setdefault(epoch, {}).get(key, 0) + 1
    complete = 0
    for epoch, counts in sorted(times.items()):
        if twice := [key for key, count in counts.items() if count > 1]:
            faults.append(f"epoch {epoch + 1}: {len(twice)} samples were used more than once ({_brief(twice)})")
        ended = done * global_batch >= (epoch + 1) * len(samples)
        if ended and len(counts) != len(samples):
            faults.append(f"epoch {epoch + 1}: {len(samples) - len(counts)} samples were not used")
        complete += ended and len(counts) == len(samples) and max(counts.values()) == 1
    starts = [event for event in events if event["what"] == "start"]
    return {
        "run": str(run),
        "steps": len(steps),
        "samples": sum(map(len, steps.values())),
        "samples_per_epoch": len(samples),
        "epochs_complete": complete,
        "samples_of_epoch_in_hand": done * global_batch % len(samples),
        "restarts": max(0, len(starts) - 1),
        "steps_done_again": sum(event["steps_done_again"] for event in starts),
        "skipped": [event for event in events if event["what"] != "start"],
        "faults": faults,
    }


def _brief(names: list) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def _sentences(result: dict[str, Any]) -> str:
    sentences = [
        f"{result['steps']} steps, {result['samples']} samples of {result['samples_per_epoch']} per epoch, "
        f"{result['restarts']} restarts, {result['steps_done_again']} steps done again",
        f"{result['epochs_complete']} epochs complete, {result['samples_of_epoch_in_hand']} samples into the next",
        *(
            f"step {event['step']}: {event['what']}: {event['why']} ({' '.join(event['keys'])})"
            for event in result["skipped"]
        ),
        *(f"FAULT: {fault}" for fault in result["faults"]),
    ]
    if not result["faults"]:
        sentences.append("every sample exactly once per epoch, in the planned order")
    return "\n".join(sentences)
