"""The book's Sphinx extension: local assets for figures and formulas."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx

from polylib.lab.figures import asset, template


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


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", copy_assets)
    app.connect("config-inited", lambda app, config: setattr(config, "mathjax_path", "mathjax/tex-chtml.js"))
    app.add_css_file("polylib.css")
    app.add_js_file("polylib.js", loading_method="defer")
    return {"parallel_read_safe": True, "version": "1"}
