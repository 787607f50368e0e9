"""`{timing}`: how long each chapter and lab took to execute."""

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def times(source: Path) -> list[tuple[str, str, float, float]]:
    """Page, title, seconds and t of every executed notebook, the longest first."""
    rows = []
    for path in [*source.glob("book/*/*.ipynb"), *source.glob("book/*.ipynb"), *source.glob("labs/*.ipynb")]:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), path.stem)
        took = notebook["metadata"].get("polylib", {})
        if "seconds" in took:
            rows.append((path.relative_to(source).with_suffix("").as_posix(), title, took["seconds"], took["t"]))
    return sorted(rows, key=lambda row: -row[3])


def table(rows: list[tuple[str, str, float, float]]) -> str:
    lines = [
        f'<tr><td><a href="../{page}.html">{title}</a></td><td>{seconds:.1f}</td><td>{t:.0f}</td></tr>'
        for page, title, seconds, t in rows
    ]
    total = f"<tr><th>all</th><th>{sum(row[2] for row in rows):.0f}</th><th>{sum(row[3] for row in rows):.0f}</th></tr>"
    head = "<tr><th>page</th><th>seconds</th><th>t</th></tr>"
    return f'<table class="polylib-ledger-counts"><thead>{head}</thead><tbody>{"".join(lines)}{total}</tbody></table>'


class Timing(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return [nodes.raw("", table(times(Path(self.env.srcdir))), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("timing", Timing)
    return {"parallel_read_safe": True, "version": "1"}
