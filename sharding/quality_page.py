"""The pictures of `sharding.quality`: a tile a scan, sheets of tiles, and one page that needs no network."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sharding.outliers import MEASURES, Judged
from sharding.packed import PackedScan

PLANE_EDGE = 168  # pixels
AXIAL_HEIGHT = 0.6  # of the grid, from below: a head hangs from its top, so that its middle lies above the grid's
SHEET_COLUMNS, SHEET_ROWS, CAPTION_HEIGHT, GAP = 3, 8, 34, 8
FLAGGED, QUIET = (255, 170, 80), (200, 200, 200)


def draw_tile(scan: PackedScan) -> bytes:
    """A JPEG of three planes through a scan's grid: axial, coronal, sagittal, with the sides' letters on them.

    The subject's left is on the left of the picture, as in the voxels; the nose of the sagittal plane points right.
    """
    grid_XYZ = scan.read_grid()
    x, y, z = scan.grid_size // 2, scan.grid_size // 2, int(scan.grid_size * AXIAL_HEIGHT)
    tile = Image.new("L", (3 * PLANE_EDGE, PLANE_EDGE))
    draw = ImageDraw.Draw(tile)
    planes = [(grid_XYZ[:, :, z], "LR"), (grid_XYZ[:, y], "LR"), (grid_XYZ[x], "PA")]
    for number, (plane, sides) in enumerate(planes):
        picture = Image.fromarray(np.ascontiguousarray(plane.T[::-1]))
        left, right = number * PLANE_EDGE, (number + 1) * PLANE_EDGE
        tile.paste(picture.resize((PLANE_EDGE, PLANE_EDGE), Image.Resampling.BICUBIC), (left, 0))
        for letter, at, anchor in ((sides[0], left + 4, "lm"), (sides[1], right - 4, "rm")):
            where = (at, PLANE_EDGE // 2)
            draw.text(where, letter, 255, ImageFont.load_default(13), anchor, stroke_width=2, stroke_fill=0)
    jpeg = io.BytesIO()
    tile.save(jpeg, "JPEG", quality=80)
    return jpeg.getvalue()


def write_sheets(folder: Path, shown: list[Judged], tiles: list[bytes]) -> None:
    """Writes page-001.jpg and so on, 24 scans each with name, cohort, diagnosis and first flag, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("page-*.jpg"):
        old.unlink()
    width, height = 3 * PLANE_EDGE + GAP, PLANE_EDGE + CAPTION_HEIGHT + GAP
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    for first in range(0, len(shown), per_sheet):
        here = list(zip(shown, tiles, strict=True))[first : first + per_sheet]
        rows = -(-len(here) // SHEET_COLUMNS)
        sheet = Image.new("RGB", (SHEET_COLUMNS * width + GAP, rows * height + GAP), (17, 18, 20))
        draw = ImageDraw.Draw(sheet)
        for place, (one, tile) in enumerate(here):
            left, top = GAP + place % SHEET_COLUMNS * width, GAP + place // SHEET_COLUMNS * height
            sheet.paste(Image.open(io.BytesIO(tile)), (left, top + CAPTION_HEIGHT))
            about = " - ".join(filter(None, [one.scan.name, one.scan.cohort, one.scan.diagnosis, one.scan.split]))
            color = FLAGGED if one.flags else QUIET
            draw.text((left, top), _fitted(about, 14), color, ImageFont.load_default(14))
            draw.text((left, top + 17), _fitted("; ".join(one.flags), 12), color, ImageFont.load_default(12))
        sheet.save(folder / f"page-{first // per_sheet + 1:03d}.jpg", quality=85)


def _fitted(text: str, size: int) -> str:
    """The text on one line, cut to the width of a tile."""
    text, font, width = " ".join(text.split()), ImageFont.load_default(size), 3 * PLANE_EDGE - 8
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def write_page(path: Path, judged: list[Judged], tiles: dict[str, bytes]) -> None:
    """Writes the page: pictures, then cohorts' medians, then the table of all scans. `tiles` are JPEGs by KEY."""
    scans = [
        {
            "name": one.scan.name,
            "key": one.scan.key,
            "cohort": one.scan.cohort,
            "diagnosis": one.scan.diagnosis,
            "split": one.scan.split,
            "score": round(one.score, 1),
            "measures": [float(f"{one.measures[name]:.4g}") for name in MEASURES],
            "flags": one.flags,
        }
        for one in judged
    ]
    pictures = {key: base64.b64encode(tile).decode() for key, tile in tiles.items()}
    data = {"measures": list(MEASURES), "cohorts": _medians(judged), "scans": scans, "pictures": pictures}
    # `<` is the only letter with which a name could end the script that carries it.
    path.write_text(PAGE.replace("{{DATA}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")))


def _medians(judged: list[Judged]) -> list[dict]:
    cohorts = Counter(one.scan.cohort for one in judged)
    return [
        {
            "name": name,
            "scans": count,
            "flagged": sum(bool(one.flags) for one in judged if one.scan.cohort == name),
            "medians": [
                float(f"{np.median([one.measures[measure] for one in judged if one.scan.cohort == name]):.4g}")
                for measure in MEASURES
            ],
        }
        for name, count in cohorts.most_common()
    ]


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>What was packed</title>
<style>
body { margin: 0; background: #111214; color: #d8dade; font: 14px/1.4 system-ui, sans-serif }
header { padding: 18px 20px 4px }
h1 { font-size: 20px; margin: 0 0 4px }
h2 { font-size: 16px; margin: 28px 0 8px }
p { margin: 0; color: #9a9fa8 }
#bar { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 10px; align-items: center;
 padding: 10px 20px; background: #111214ee; border-bottom: 1px solid #2a2d33 }
#bar .right { margin-left: auto }
select, input, button { background: #1d1f24; color: inherit; border: 1px solid #3a3e46; border-radius: 5px;
 padding: 4px 8px; font: inherit }
button { cursor: pointer }
main { padding: 12px 20px 60px }
#pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 12px }
.card { background: #1a1c20; border: 1px solid #2a2d33; border-radius: 8px; overflow: hidden }
.card img { display: block; width: 100%; aspect-ratio: 3; background: #000; cursor: pointer }
.card div { display: flex; gap: 10px; align-items: center; padding: 6px 10px 0 }
.card b { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 600 }
.card p { padding: 0 10px; font-size: 13px }
.card ul { margin: 2px 10px 8px; padding: 0; list-style: none; color: #ffaa50; font-size: 13px }
.flagged { border-color: #a8672a }
.rate { padding: 1px 8px; color: #9a9fa8 }
.ok-on { background: #1f6f43; color: #fff }
.bad-on { background: #a3262a; color: #fff }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: right; padding: 4px 9px; border-bottom: 1px solid #24272c; white-space: nowrap }
th { color: #9a9fa8; font-weight: 500 }
.text { text-align: left }
td.flags { color: #ffaa50; white-space: normal; min-width: 260px; text-align: left }
tr.here { background: #33405a }
#table tbody tr { cursor: pointer }
</style>
</head>
<body>
<header><h1>What was packed</h1><p id="summary"></p>
<p>L, R, A, P: the subject's left, right, front, back. Pictures of heads and ids: protected health data, keep this file
where the scans may be.</p></header>
<div id="bar">
<select id="flagged"><option value="">all scans</option><option value="flagged">flagged</option>
<option value="bad">rated bad</option><option value="unrated">not rated</option></select>
<select id="cohort"><option value="">every cohort</option></select>
<select id="diagnosis"><option value="">every diagnosis</option></select>
<select id="split"><option value="">every split</option></select>
<input id="search" type="search" placeholder="name or KEY">
<label>sort by <select id="sort"><option value="worst">worst first</option><option value="name">name</option></select>
</label>
<span id="count"></span>
<button id="export" class="right">Save ratings.csv</button>
</div>
<main>
<section id="pictures"></section>
<h2>Cohorts: medians</h2><div class="scroll"><table id="cohorts"></table></div>
<h2>Scans</h2>
<p><button id="back">&lsaquo;</button> <span id="place"></span> <button id="next">&rsaquo;</button></p>
<div class="scroll"><table id="table"></table></div>
</main>
<script id="data" type="application/json">{{DATA}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const ROWS = 200;
const FIELDS = ["cohort", "diagnosis", "split"];
// Ratings outlive a reload, in this browser, under the name of this set of scans.
const STORE = "ratings " + data.scans.map(scan => scan.key).sort().join("").slice(0, 160) + data.scans.length;
let ratings = new Map(), first = 0, found = [];
try { ratings = new Map(JSON.parse(localStorage.getItem(STORE) || "[]")); } catch (error) { /* none: one visit */ }

function make(tag, text, className, parent) {
  const element = document.createElement(tag);
  if (text !== "") element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}

function rate(scan, rating) {
  if (ratings.get(scan.key) === rating) ratings.delete(scan.key); else ratings.set(scan.key, rating);
  try { localStorage.setItem(STORE, JSON.stringify([...ratings])); } catch (error) { /* as above */ }
  showRatings();
}

function showRatings() {
  for (const button of document.querySelectorAll(".rate"))
    button.classList.toggle(button.value + "-on", ratings.get(button.dataset.key) === button.value);
  byId("export").textContent = `Save ratings.csv (${ratings.size})`;
}

function rateButtons(scan, parent) {
  for (const rating of ["ok", "bad"]) {
    const button = make("button", rating, "rate", parent);
    button.value = rating;
    button.dataset.key = scan.key;
    button.onclick = event => { event.stopPropagation(); rate(scan, rating); };
  }
}

function showPicture(scan, parent) {
  const card = make("div", "", "card" + (scan.flags.length ? " flagged" : ""), parent);
  card.id = "card-" + scan.key;
  const picture = make("img", "", "", card);
  picture.loading = "lazy";
  picture.alt = scan.name;
  picture.src = "data:image/jpeg;base64," + data.pictures[scan.key];
  picture.onclick = () => goToRow(scan);
  const line = make("div", "", "", card);
  make("b", scan.name, "", line).title = scan.name;
  rateButtons(scan, line);
  make("p", [scan.cohort, scan.diagnosis, scan.split].filter(Boolean).join(" \\u00b7 "), "", card);
  const flags = make("ul", "", "", card);
  for (const flag of scan.flags) make("li", flag, "", flags);
}

function showRow(scan, parent) {
  const row = make("tr", "", "", parent);
  row.id = "row-" + scan.key;
  rateButtons(scan, make("td", "", "text", row));
  for (const text of [scan.name, scan.cohort, scan.diagnosis, scan.split]) make("td", text, "text", row);
  for (const value of [scan.score, ...scan.measures]) make("td", String(value), "", row);
  make("td", scan.flags.join("; "), "flags", row);
  row.onclick = () => highlight(byId("card-" + scan.key) || row);
}

function goToRow(scan) {
  const place = found.indexOf(scan);
  first = place - place % ROWS;
  showTable();
  highlight(byId("row-" + scan.key));
}

function highlight(element) {
  document.querySelectorAll(".here").forEach(other => other.classList.remove("here"));
  element.classList.add("here");
  element.scrollIntoView({ block: "center" });
}

function showTable() {
  byId("table").replaceChildren();
  const head = make("tr", "", "", make("thead", "", "", byId("table")));
  ["rating", "scan", "cohort", "diagnosis", "split"].forEach(name => make("th", name, "text", head));
  ["score (MAD)", ...data.measures].forEach(name => make("th", name, "", head));
  make("th", "flags", "text", head);
  const body = make("tbody", "", "", byId("table"));
  for (const scan of found.slice(first, first + ROWS)) showRow(scan, body);
  const last = Math.min(first + ROWS, found.length);
  byId("place").textContent = `${found.length ? first + 1 : 0} to ${last} of ${found.length}`;
  showRatings();
}

function show() {
  const wanted = byId("flagged").value, words = byId("search").value.toLowerCase();
  found = data.scans.filter(scan =>
    FIELDS.every(name => !byId(name).value || (scan[name] || "unknown") === byId(name).value)
    && (wanted !== "flagged" || scan.flags.length) && (wanted !== "bad" || ratings.get(scan.key) === "bad")
    && (wanted !== "unrated" || !ratings.has(scan.key))
    && (scan.name + " " + scan.key).toLowerCase().includes(words));
  const by = byId("sort").value, measure = data.measures.indexOf(by);
  if (by === "name") found.sort((a, b) => a.name.localeCompare(b.name));
  if (measure >= 0) found.sort((a, b) => a.measures[measure] - b.measures[measure]);
  first = 0;
  byId("pictures").replaceChildren();
  const shown = found.filter(scan => data.pictures[scan.key]);
  for (const scan of shown) showPicture(scan, byId("pictures"));
  byId("count").textContent = `${found.length} scans, ${shown.length} pictures`;
  showTable();
}

function ratingsCsv() {
  const quote = text => /[",\\r\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const rated = data.scans.filter(scan => ratings.has(scan.key));
  return "scan,rating\\n" + rated.map(scan => quote(scan.name) + "," + ratings.get(scan.key) + "\\n").join("");
}

byId("export").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ratingsCsv()], { type: "text/csv" }));
  link.download = "ratings.csv";
  link.click();
};
byId("back").onclick = () => { first = Math.max(0, first - ROWS); showTable(); };
byId("next").onclick = () => { if (first + ROWS < found.length) first += ROWS; showTable(); };
for (const name of FIELDS)
  for (const value of [...new Set(data.scans.map(scan => scan[name] || "unknown"))].sort())
    make("option", value, "", byId(name)).value = value;
for (const name of data.measures) make("option", name, "", byId("sort")).value = name;
for (const name of ["flagged", ...FIELDS, "search", "sort"]) byId(name).oninput = show;

const head = make("tr", "", "", byId("cohorts"));
["cohort"].forEach(name => make("th", name, "text", head));
["scans", "flagged", ...data.measures].forEach(name => make("th", name, "", head));
for (const cohort of data.cohorts) {
  const row = make("tr", "", "", byId("cohorts"));
  make("td", cohort.name, "text", row);
  for (const value of [cohort.scans, cohort.flagged, ...cohort.medians]) make("td", String(value), "", row);
}
const numFlagged = data.scans.filter(scan => scan.flags.length).length;
byId("summary").textContent = `${data.scans.length} scans, ${numFlagged} flagged; worst first. A score counts median `
  + "absolute deviations (MAD) from the cohort's median. Click a picture for its row, a row for its picture.";
show();
</script>
</body>
</html>
"""
