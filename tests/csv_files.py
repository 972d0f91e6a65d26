"""Tables that a command wrote, for tests that read, split or spoil them."""

import csv
from collections.abc import Callable
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV file, each as a dict."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit(path: Path, change: Callable[[list[dict]], list[dict] | None]) -> None:
    """Rewrites a table; `change` gets its rows and returns them (or None, if it changed them in place)."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), reader.fieldnames
    rows = change(rows) or rows
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
