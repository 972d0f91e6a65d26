"""One document, written as markdown and as a web page that needs nothing but itself.

A document is a list of blocks. The markdown links its pictures, the page holds them, so that it can be mailed.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NOTHING_FROM_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page's content security policy: whatever is in a report, a browser loads and runs none of it."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; color: #222; background: #fff;
       max-width: 1160px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0.3em; }
h2 { font-size: 1.35em; margin-top: 2em; padding-bottom: 0.2em; border-bottom: 2px solid #1f77b4; }
h3 { font-size: 1.05em; margin: 1.6em 0 0.4em; }
table { border-collapse: collapse; margin: 0.6em 0; font-size: 0.9em; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25em 0.55em; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { background: #f2f5f8; border-bottom: 1px solid #999; vertical-align: bottom; }
td:first-child, .interval { white-space: nowrap; }
table.words td, table.words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.words td:first-child { white-space: nowrap; color: #555; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0.6em 0; }
.gallery figure { width: 320px; }
.gallery img { width: 100%; background: #000; }
figcaption { font-size: 0.85em; color: #555; }
.warning { background: #fff4e5; border-left: 4px solid #d95f02; padding: 0.4em 0.8em; }
pre { background: #f2f5f8; padding: 0.8em; overflow-x: auto; font-size: 0.85em; }
@media screen and (max-width: 700px) {
  body { margin: 1em auto; padding: 0 0.8em; }
  td:first-child, table.words td:first-child { white-space: normal; }
  table:not(.words) td:first-child { min-width: 6em; }
  .wide > img { max-width: none; width: 720px; }
}
@media print {
  @page { margin: 12mm; }
  body { font-size: 10px; max-width: none; margin: 0; padding: 0; print-color-adjust: exact; }
  .wide { overflow-x: visible; }
  th, td { padding: 0.2em 0.35em; }
  tr, figure { break-inside: avoid; }
  h2, h3, h2 + p { break-after: avoid; }
}
"""


class Heading(NamedTuple):
    """`level` 1 is the document's title."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """Words; a warning stands out in the page."""

    text: str
    is_warning: bool = False


class Bullets(NamedTuple):
    """A list."""

    items: list[str]


class Table(NamedTuple):
    """Cells as they are printed; of words, not of numbers, where said."""

    head: Sequence[str]
    rows: list[Sequence[str]]
    is_words: bool = False


class Picture(NamedTuple):
    """A PNG file, its path relative to the folder of the document, with '/'."""

    path: str
    caption: str


class Gallery(NamedTuple):
    """Small pictures side by side."""

    pictures: list[Picture]


Block = Heading | Paragraph | Bullets | Table | Picture | Gallery


def write_pages(folder: Path, name: str, blocks: list[Block]) -> None:
    """Writes `name`.md and `name`.html. The pictures lie in the folder already; a missing one is said."""
    (folder / f"{name}.md").write_text(to_markdown(blocks), encoding="utf-8")
    (folder / f"{name}.html").write_text(to_html(blocks, folder), encoding="utf-8")


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal; the first row is its head, and a rule follows it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [head, "-" * len(head), *body]


def to_markdown(blocks: list[Block]) -> str:
    """The document as GitHub shows it."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text, is_warning):
            return f"**{_plain(text)}**" if is_warning else _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *rows]
            return "\n".join(
                f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
            )
        case Picture(path, caption):
            return f"![{_plain(caption)}]({path})"
        case Gallery(pictures):
            return "\n\n".join(f"![{_plain(caption)}]({path})\n{_plain(caption)}" for path, caption in pictures)


def _plain(text: str) -> str:
    """One line, in which no name of a cohort can begin a tag."""
    return " ".join(text.split()).replace("<", "&lt;")


def to_html(blocks: list[Block], folder: Path) -> str:
    """The whole page; it loads nothing."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "MedBLIP")
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FROM_OUTSIDE}">\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, is_warning):
            kind = ' class="warning"' if is_warning else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Table(head, rows, is_words):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            lines = ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            kind = ' class="words"' if is_words else ""
            return f'<div class="wide"><table{kind}>\n<tr>{top}</tr>\n{body}\n</table></div>'
        case Picture(path, caption):
            return f'<figure class="wide">{_image(folder / path, caption)}</figure>'
        case Gallery(pictures):
            figures = [
                f"<figure>{_image(folder / path, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
                for path, caption in pictures
            ]
            return f'<div class="gallery">{"".join(figures)}</div>'


def _cell(text: str) -> str:
    """A narrow column breaks before an interval, not within."""
    return re.sub(r"(\[[^\]]*\])", r'<span class="interval">\1</span>', html.escape(text))


def _image(path: Path, caption: str) -> str:
    if not path.is_file():
        return "<p>(the picture is missing)</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
