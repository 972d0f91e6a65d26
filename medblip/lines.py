"""Files of a run that grow line by line: written whatever the disk does, and cut back to a step on resume."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("medblip")


class Appender:
    """Appends to a file that a full or failing disk must not end the run for: what could not be written is kept.

    A write that fails is said once, kept in memory and tried again with the next one; nothing is written twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pending = b""
        self._failing = False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def append(self, content: bytes) -> None:
        """Appends, now or when the disk allows it."""
        self._pending += content
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s): training goes on, and it is tried again", self.path, error)
            self._failing = True

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.warning("%s could not be brought to the disk (%s)", self.path, error)

    def close(self) -> None:
        """Tries once more what is pending, and closes."""
        self.append(b"")
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; empty if there is no file.

    The last line may be torn by a kill; any other that is damaged is named in a warning and left out.
    """
    records = []
    written = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(written, 1):
        try:
            records.append(json.loads(line))
        except ValueError:  # also bytes that are no text
            if number < len(written):
                log.warning("%s: line %d is damaged and is left out", path, number)
    return records


def cut_back(path: Path, step: int) -> None:
    """Keeps the records of a file up to a step, each of which has its `step`; nothing where there is no file."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step]
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)
