"""The ledger: every claim of the book with its verdict at both scales, as a page to filter and as files to download.

Where a claim's words stand: what the paper says, what is tested and why something is not, in the chapter's claims file;
what came out at scale `ci`, in the executed notebook of this build; at scale `laptop`, in the chapter's record.
"""

import csv
import html
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from polylib.lab.claims import HOLDS, NOT_BORNE_OUT, NOT_TESTED, VERDICTS, by_number, read_claims, records_of

NO_RECORD = "no record"
FIELDS = ("part", "chapter", "id", "paper", "test", "reason", "ci", "ci_measured", "ci_margin")
LAPTOP_FIELDS = ("laptop", "laptop_measured", "laptop_margin", "laptop_date", "laptop_current")


def _rows_of_chapter(path: Path, part: str, title: str) -> list[dict[str, str]]:
    """The rows of one chapter, whose claims file is `path`."""
    name = path.name.removesuffix(".claims.toml")
    executed, recorded = path.with_name(f"{name}.ipynb"), path.with_name(f"{name}.laptop.json")
    notebook = json.loads(executed.read_text(encoding="utf-8")) if executed.exists() else {"cells": [], "metadata": {}}
    laptop = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {"claims": {}}
    code = notebook["metadata"].get("polylib", {}).get("code")
    found = {record["id"]: record for record in records_of(notebook)}
    rows = []
    for id, texts in sorted(read_claims(path).items(), key=lambda item: by_number(item[0])):
        here = found.get(id, {"verdict": NOT_TESTED, "measured": "", "margin": ""})
        there = laptop["claims"].get(id, {})
        row = {"part": part, "chapter": title, "id": id, "paper": texts["paper"], "test": texts["test"]}
        row |= {"reason": texts["reason"], "ci": here["verdict"]}
        row |= {f"ci_{key}": here[key] for key in ("measured", "margin")}
        row["laptop"] = there.get("verdict", NOT_TESTED if laptop["claims"] else NO_RECORD)
        row |= {f"laptop_{key}": there.get(key, "") for key in ("measured", "margin")}
        row["laptop_date"] = laptop.get("date", "")
        row["laptop_current"] = "" if not laptop["claims"] else "yes" if laptop.get("code") == code else "no"
        row["page"] = f"{path.parent.name}/{name}"
        rows.append(row)
    return rows


def rows_of_book(source: Path) -> tuple[list[dict[str, str]], int]:
    """Every claim, in the order of the list of chapters, and how many papers the book has."""
    parts = yaml.safe_load((source / "book" / "chapters.yml").read_text(encoding="utf-8"))
    rows = []
    for part in parts:
        for chapter in part["chapters"]:
            path = source / "book" / part["part"] / f"{chapter['slug']}.claims.toml"
            if path.exists():
                rows += _rows_of_chapter(path, part["title"], chapter["title"])
    return rows, sum(len(part["chapters"]) for part in parts)


def _badge(verdict: str, note: str = "") -> str:
    colour = VERDICTS.get(verdict, "")
    style = f' style="background:{colour}"' if colour else ""
    kind = "polylib-verdict" if colour else "polylib-verdict polylib-verdict-none"
    return f'<span class="{kind}"{style}>{html.escape(verdict)}</span>{note}'


def _counts(rows: list[dict[str, str]]) -> str:
    """How many claims of each part have which verdict, at each scale."""
    scales = {"ci": "here", "laptop": "in the larger run"}
    head = "".join(f'<th colspan="3">{words}</th>' for words in scales.values())
    kinds = "".join(f"<th>{kind}</th>" for _ in scales for kind in VERDICTS)
    lines = []
    for part in [*dict.fromkeys(row["part"] for row in rows), ""]:
        chosen = [row for row in rows if part in ("", row["part"])]
        cells = ""
        for scale in scales:
            count = Counter(row[scale] for row in chosen)
            cells += "".join(f"<td>{count[kind]}</td>" for kind in VERDICTS)
        lines.append(f"<tr><th>{html.escape(part) or 'all'}</th>{cells}</tr>")
    return (
        '<div class="polylib-ledger-scroll"><table class="polylib-ledger-counts">'
        f"<thead><tr><th></th>{head}</tr><tr><th>part</th>{kinds}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _measured(row: dict[str, str], scale: str) -> str:
    margin = f" ({row[f'{scale}_margin']})" if row[f"{scale}_margin"] else ""
    return html.escape(row[f"{scale}_measured"] + margin)


def _row(row: dict[str, str]) -> str:
    verdicts = _badge(row["ci"])
    stale = " <small>of an earlier version of the code</small>" if row["laptop_current"] == "no" else ""
    laptop = _badge(row["laptop"], stale)
    tested = html.escape(row["test"])
    if row["reason"] and NOT_TESTED in (row["ci"], row["laptop"]):
        tested += f'<div class="polylib-reason">{html.escape(row["reason"])}</div>'
    link = f'<a href="{row["page"]}.html#claim-{row["id"]}">{html.escape(row["chapter"])}, {row["id"]}</a>'
    cells = {
        "claim": link,
        "the paper": html.escape(row["paper"]),
        "tested": tested,
        "here": f"{verdicts}<div>{_measured(row, 'ci')}</div>",
        "larger run": f"{laptop}<div>{_measured(row, 'laptop')}</div>",
    }
    columns = "".join(f'<td data-label="{label}">{text}</td>' for label, text in cells.items())
    kinds = html.escape(f"{row['ci']}|{row['laptop']}")
    return f'<tr data-part="{html.escape(row["part"])}" data-verdicts="{kinds}">{columns}</tr>'


def _select(name: str, label: str, values: list[str]) -> str:
    options = "".join(f"<option>{html.escape(value)}</option>" for value in values)
    return f'<label>{label} <select name="{name}"><option value="">all</option>{options}</select></label>'


def page(rows: list[dict[str, str]], papers: int) -> str:
    """The whole ledger as HTML. Without JavaScript it shows every row."""
    written = len({row["page"] for row in rows})
    best = [next((v for v in (row["laptop"], row["ci"]) if v in (HOLDS, NOT_BORNE_OUT)), NOT_TESTED) for row in rows]
    count = Counter(best)
    tested = count[HOLDS] + count[NOT_BORNE_OUT]
    summary = (
        f"{written} of {papers} chapters are written, with {len(rows)} claims. {tested} of them are tested at one scale"
        f" at least; by the larger run where there is one, {count[HOLDS]} hold and {count[NOT_BORNE_OUT]} are not borne"
        f" out. {count[NOT_TESTED]} are not tested here."
    )
    filters = (
        _select("part", "Part", list(dict.fromkeys(row["part"] for row in rows)))
        + _select("verdict", "Verdict", list(VERDICTS))
        + '<label>Text <input name="text" type="search"></label> <output aria-live="polite"></output>'
    )
    head = "".join(f"<th>{label}</th>" for label in ("Claim", "The paper", "Tested", "Here", "Larger run"))
    return (
        f'<p>{summary}</p>{_counts(rows)}<form class="polylib-ledger-filter" hidden>{filters}</form>'
        f'<table class="polylib-ledger"><thead><tr>{head}</tr></thead><tbody>{"".join(map(_row, rows))}</tbody></table>'
        '<p>Download: <a href="ledger.json" download>ledger.json</a>, <a href="ledger.csv" download>ledger.csv</a>.</p>'
    )


class Ledger(SphinxDirective):
    """`{ledger}`: every claim of every chapter, with what was measured at both scales."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return [nodes.raw("", page(*rows_of_book(Path(self.env.srcdir))), format="html")]


def write_files(app: Sphinx, error: Exception | None) -> None:
    """The ledger as JSON and CSV, beside its page."""
    folder = Path(app.outdir) / "book"
    if error is not None or app.builder.format != "html" or not (folder / "ledger.html").exists():
        return
    rows, _ = rows_of_book(Path(app.srcdir))
    rows = [{name: row[name] for name in FIELDS + LAPTOP_FIELDS} for row in rows]
    (folder / "ledger.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS + LAPTOP_FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "ledger.csv").write_text(text.getvalue(), encoding="utf-8-sig")  # spreadsheets read UTF-8 by its mark


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("ledger", Ledger)
    app.connect("build-finished", write_files)
    app.add_js_file("ledger.js", loading_method="defer")
    return {"parallel_read_safe": True, "version": "1"}
