"""The book's Sphinx extension: local assets for figures and formulas, and the ledger of claims."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from polylib.lab.claims import MIME
from polylib.lab.figures import asset, template

PAPERS = 60
COLUMNS = {  # title and relative width
    "id": ("Claim", 8),
    "statement": ("What the paper says", 42),
    "measured": ("Measured here", 34),
    "status": ("Verdict", 16),
}


def copy_assets(app: Sphinx, error: Exception | None) -> None:
    """Put plotly.js, the figure script and MathJax with its fonts into the site, once for all pages."""
    if error is not None or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    templates = {theme: template(theme).to_plotly_json() for theme in ("light", "dark")}
    script = f"window.polylibTemplates = {json.dumps(templates)};\n{asset('polylib.js')}"
    (static / "polylib.js").write_text(script, encoding="utf-8")
    (static / "polylib.css").write_text(asset("polylib.css"), encoding="utf-8")
    (static / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    (static / "mathjax").mkdir(exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", static / "mathjax")
    fonts = Path("output", "chtml", "fonts")
    shutil.copytree(mathjax / fonts, static / "mathjax" / fonts, dirs_exist_ok=True)


def claims_of(notebook: Path) -> list[dict[str, str]]:
    """The records that `polylib.lab.claim` left in the outputs of an executed notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]


class Ledger(SphinxDirective):
    """`{ledger}`: every claim of every executed chapter, with what was measured."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        source = Path(self.env.srcdir)
        chapters = [(path, claims_of(path)) for path in sorted(source.glob("book/*/*.ipynb"))]
        chapters = [(path, claims) for path, claims in chapters if claims]
        records = [record for _, claims in chapters for record in claims]
        held = sum(record["status"] == "holds" for record in records)
        summary = (
            f"{len(chapters)} of {PAPERS} chapters are written. Of their {len(records)} claims {held} hold here,"
            f" {len(records) - held} can't be shown at this scale."
        )
        return [nodes.paragraph(text=summary), *self.sections(source, chapters)]

    def sections(self, source: Path, chapters: list[tuple[Path, list[dict[str, str]]]]) -> Iterator[nodes.Node]:
        for path, claims in chapters:
            name = path.relative_to(source).with_suffix("").as_posix()
            link, _ = self.state.inline_text(f"{{doc}}`/{name}`", self.lineno)
            yield nodes.paragraph("", "", *link)
            yield nodes.container("", _table(claims), classes=["polylib-ledger"])


def _table(claims: list[dict[str, str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(COLUMNS))
    group.extend(nodes.colspec(colwidth=width) for _, width in COLUMNS.values())
    group += nodes.thead("", _row(title for title, _ in COLUMNS.values()))
    rows = []
    for claim in claims:
        margin = f" (margin: {claim['margin']})" if claim["margin"] else ""
        shown = {**claim, "measured": " ".join(filter(None, [claim["measured"] + margin, claim["reason"]]))}
        rows.append(_row(shown[key] for key in COLUMNS))
    group += nodes.tbody("", *rows)
    return nodes.table("", group)


def _row(texts: Any) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=text)) for text in texts))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("ledger", Ledger)
    app.connect("build-finished", copy_assets)
    app.connect("config-inited", lambda app, config: setattr(config, "mathjax_path", "mathjax/tex-chtml.js"))
    app.add_css_file("polylib.css")
    app.add_js_file("polylib.js", loading_method="defer")
    return {"parallel_read_safe": True, "version": "1"}
