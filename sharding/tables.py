"""Reading the tables of a release: CSV, TSV or XLSX, every cell as text, every fault with its file, row and column.

Nothing is guessed. A table without a needed column is refused. A cell that means nothing raises `BadCell`; what hangs
on it (a visit, a person) is then set aside by name, and the rest of the table is used. Codes for "missing" differ from
column to column and are given where a column is read.
"""

import csv
import datetime
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

csv.field_size_limit(2**24)  # free-text columns of some tables go beyond the default


class BadCell(ValueError):
    """A value that its column cannot have; the message names file, row, column and value."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    file: Path
    line: int
    """As a spreadsheet counts: the header is row 1."""
    columns: dict[str, int]
    width: int
    """Columns of the header."""
    cells: list[str]

    def __getitem__(self, column: str) -> str:
        """The cell, stripped; empty where the table has no such column or the line is short."""
        place = self.columns.get(column, len(self.cells))
        return self.cells[place].strip() if place < len(self.cells) else ""

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    @property
    def surplus(self) -> int:
        """How many filled cells stand right of the header: then a comma was not quoted, and columns have shifted."""
        if len(self.cells) <= self.width:
            return 0
        beyond = self.cells[self.width :]
        return len(beyond) if any(cell.strip() for cell in beyond) else 0

    @property
    def where(self) -> str:
        """`FILE row N`."""
        return f"{self.file} row {self.line}"

    def bad(self, column: str, expected: str) -> BadCell:
        """The error for a cell of this row."""
        return BadCell(f"{self.where}, column {column!r}: {self[column]!r} is not {expected}")

    def text(self, column: str, missing: Collection[str] = ()) -> str:
        """The cell, empty if it is one of `missing`.

        Raises:
            BadCell: the cell is not UTF-8, or the line has more cells than the header.
        """
        value = self[column]
        if self.surplus:
            raise BadCell(f"{self.where}: {self.surplus} cells more than the header has; quote a cell that has commas")
        if not value.isascii() and any("\udc80" <= letter <= "\udcff" for letter in value):
            raise self.bad(column, "UTF-8; save the table as UTF-8")
        return "" if value in missing else value

    def code(self, column: str, meanings: dict[str, str], missing: Collection[str] = ()) -> str | None:
        """What a code means, None if missing. `3`, `3.0` and `03` are one code.

        Raises:
            BadCell: the code is not in the table.
        """
        value = self.text(column, missing)
        if value == "":
            return None
        plain = _plain_number(value)
        if plain in missing:
            return None
        for key in (value, plain):
            if key in meanings:
                return meanings[key]
        raise self.bad(column, f"one of {', '.join(meanings)}")

    def number(
        self, column: str, low: float, high: float, missing: Collection[str] = (), whole: bool = False
    ) -> float | None:
        """A number within `low`..`high`, None if missing (codes as text, `-4`; `-4.0` counts as well).

        Raises:
            BadCell: not a number, not finite, or out of range.
        """
        value = self.text(column, missing)
        if value == "" or _plain_number(value) in missing:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high or (whole and number != int(number)):
            raise self.bad(column, f"a {'whole ' if whole else ''}number within {low:g}..{high:g}")
        return number

    def date(self, column: str, formats: Collection[str], missing: Collection[str] = ()) -> datetime.date | None:
        """A date in one of `formats` (as strptime), None if missing.

        Raises:
            BadCell: no format fits, or two fit with different dates.
        """
        value = self.text(column, missing)
        if value == "":
            return None
        found = {parsed for text_format in formats if (parsed := _date(value, text_format)) is not None}
        if len(found) != 1:
            raise self.bad(column, f"a date like {' or '.join(formats)}")
        return found.pop()


@dataclass(slots=True)
class Entry:
    """What a table says under one key."""

    where: str
    """`FILE row N`, of the first row with this key."""
    values: dict[str, object] = field(default_factory=dict)
    fault: str = ""
    """Why it cannot be used: a bad cell, or two rows that contradict each other."""


def index_rows(
    rows: Iterable[Row],
    key: Callable[[Row], Hashable | None],
    values: Callable[[Row], dict[str, object]],
    faults: list[str],
) -> dict[Hashable, Entry]:
    """The rows by key. Equal rows count once; a bad cell or a contradiction is its entry's fault, and goes to `faults`.

    `key` returns None for a row to pass over. A row whose key cannot be read is a fault and in no entry.
    """
    index: dict[Hashable, Entry] = {}
    for row in rows:
        try:
            name = key(row)
        except BadCell as error:
            faults.append(str(error))
            continue
        if name is None:
            continue
        try:
            new = Entry(row.where, values(row))
        except BadCell as error:
            new = Entry(row.where, fault=str(error))
        entry = index.setdefault(name, new)
        if entry is not new and not entry.fault and not new.fault and entry.values != new.values:
            differing = [column for column in new.values if new.values[column] != entry.values[column]]
            told = ", ".join(f"{column} {entry.values[column]} and {new.values[column]}" for column in differing)
            new.fault = f"{entry.where} and row {row.line} are of the same visit or person and differ: {told}"
        if new.fault:
            faults.append(new.fault)
            entry.fault = entry.fault or new.fault
    return index


class TablesFolder:
    """A folder in which tables are looked for, at any depth. It is walked once, however many are."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @functools.cached_property
    def files(self) -> list[tuple[str, Path]]:
        """Name and path of every file."""
        return [(name, Path(parent, name)) for parent, _, names in walk(self.path) for name in names]


def find_by_header(folder: TablesFolder, columns: Collection[str], suffixes: Collection[str] = (".csv",)) -> list[Path]:
    """The tables below `folder` whose header has all of `columns`: for downloads whose file name is the user's."""
    found = []
    for name, path in folder.files:
        if path.suffix.lower() in suffixes and not name.startswith("."):
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header = {cell.strip() for cell in next(csv.reader([file.readline()]), [])}
            if header.issuperset(columns):
                found.append(path)
    return sorted(found)


def find_table(
    folder: TablesFolder, stems: Collection[str], *, required: bool = True, suffixes: Collection[str] = (".csv",)
) -> Path | None:
    """The one file below `folder` that is named STEM or STEM_DATE, for the first of `stems` that has any.

    A date is what the archives append: `21Aug2025`, `2025-08-21`, `01-Jun-2018`; oasis-brains.org appends 16 hex digits
    (`-5708aa0a98d82080`), browsers ` (1)`. Case does not matter.

    Raises:
        ValueError: several files have the name, or none has and it is `required`; says what was looked for.
    """
    date = r"(?:_(?:\d{1,2}-?[A-Za-z]{3}-?\d{4}|\d{4}-?\d{2}-?\d{2})|-[0-9a-f]{16})?(?: ?\(\d+\))?"
    for stem in stems:
        pattern = re.compile(f"{stem}{date}(?:{'|'.join(map(re.escape, suffixes))})", re.IGNORECASE)
        found = sorted(path for name, path in folder.files if pattern.fullmatch(name))
        if len(found) > 1:
            names = ", ".join(map(str, found[:5]))
            raise ValueError(
                f"{folder}: {len(found)} tables are named {stem}: {names}; keep the newest, move the others"
            )
        if found:
            return found[0]
    if required:
        raise ValueError(
            f"{folder}: no table named {' or '.join(stems)} (a date may follow); download it, or check --tables"
        )
    return None


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, into linked folders as well, which clusters are full of; a folder that was met before is left out."""
    met = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in met:
            folders.clear()
            continue
        met.add((status.st_dev, status.st_ino))
        yield parent, folders, names


def read_table(
    path: Path,
    needed: Collection[str] = (),
    names: dict[str, Collection[str]] | None = None,
    delimiter: str = ",",
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[Row]:
    """The rows of a table that are not blank, in its order.

    `names` gives other spellings of a column: {"sex": ("M/F", "Gender")} makes the first that is there `sex` as well.
    Spellings are matched exactly, blanks around them stripped. `wanted` sees each line of a CSV file as it is and says
    whether it is worth cutting into cells: for tables of a gigabyte.

    Raises:
        ValueError: the file is empty, is not a table, has a column twice, or misses a needed one.
    """
    lines = _lines_xlsx(path) if path.suffix.lower() == ".xlsx" else _lines_csv(path, delimiter, wanted)
    try:
        _, header = next(lines)
    except StopIteration:
        raise ValueError(f"{path}: the file is empty; download it again") from None
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    columns = _columns(path, header, needed, names or {}, delimiter)
    try:
        for number, cells in lines:
            if any(cell.strip() for cell in cells):
                yield Row(path, number, columns, len(header), cells)
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error


def _columns(path: Path, header: list[str], needed: Collection[str], names: dict, delimiter: str) -> dict[str, int]:
    header = [name.strip() for name in header]
    columns = {name: place for place, name in enumerate(header)}
    for name, spellings in names.items():
        place = next((columns[spelling] for spelling in (name, *spellings) if spelling in columns), None)
        if place is not None:
            columns[name] = place
    absent = [name for name in needed if name not in columns]
    twice = [name for name in columns if name and header.count(name) > 1]
    if twice and (not needed or len(absent) < len(needed)):  # else the file has no header, only values
        raise ValueError(f"{path}: column {twice[0]!r} appears twice; download the table again")
    if absent and len(header) == 1 and re.search("[;\t]", header[0]):
        raise ValueError(f"{path}: columns must be separated by {delimiter!r}; this file has {header[0][:60]!r}")
    if absent:
        by_letters = {name.lower(): name for name in header}
        near = {name: difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.6) for name in absent}
        hints = ", ".join(
            f"{name!r}" + (f" (is it {by_letters[near[name][0]]!r}?)" if near[name] else "") for name in absent
        )
        raise ValueError(f"{path}: no column {hints}; the header is {header[:12]}{' ...' if len(header) > 12 else ''}")
    return columns


def _lines_csv(
    path: Path, delimiter: str, wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[int, list[str]]]:
    # Bytes that are not UTF-8 survive as surrogates: they are a fault only where a cell is used.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if wanted is None:
            yield from enumerate(csv.reader(file, delimiter=delimiter), start=1)
            return
        skipped = 0

        def worth_cutting() -> Iterator[str]:
            nonlocal skipped
            yield from itertools.islice(file, 1)
            for line in file:
                if '"' in line or wanted(line):  # a quoted cell may go on in the next line
                    yield line
                else:
                    skipped += 1

        for number, cells in enumerate(csv.reader(worth_cutting(), delimiter=delimiter), start=1):
            yield number + skipped, cells


def _lines_xlsx(path: Path) -> Iterator[tuple[int, list[str]]]:
    import zipfile

    import openpyxl

    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: not an Excel workbook ({error}); download it again") from error
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        yield number, ["" if cell is None else str(cell) for cell in cells]


def _plain_number(text: str) -> str:
    """`3.0` and `03` as `3`, `0.50` as `0.5`; other text as it is."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


@functools.lru_cache(65536)  # the same days come again and again, and strptime is slow
def _date(text: str, text_format: str) -> datetime.date | None:
    try:
        return datetime.datetime.strptime(text, text_format).date()
    except ValueError:
        return None
