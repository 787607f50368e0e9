"""The notebooks and the site.

python -m tools.book execute            run the chapters and labs whose code, library or scale changed
python -m tools.book build              execute, then build the site into site/
python -m tools.book serve [--port N]   show the site on this machine
python -m tools.book notebooks          write plain .ipynb copies into notebooks/
"""

import argparse
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import nbformat

from tools.execute import ROOT, SOURCES, execute, executed_path, is_notebook, markdown_files, read_source, sources

STAGE = ROOT / ".site"
SITE = ROOT / "site"
NOTEBOOKS = ROOT / "notebooks"
LINK = re.compile(r"\]\(([^)#\s:]+\.md)")
SHARED = ("_config.yml", "_toc.yml", "references.bib", "_ext", "_static", "_templates")


def point_to_notebooks(text: str, page: Path, executed: Collection[Path]) -> str:
    """Links to a .md file that is staged as an executed notebook lead to the notebook."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[1]))
        return f"]({match[1].removesuffix('.md')}.ipynb" if target in executed else match[0]

    return LINK.sub(link, text)


def stage() -> Path:
    """Copy what the site is made of, with the executed notebooks in place of their sources."""
    shutil.rmtree(STAGE, ignore_errors=True)
    source = STAGE / "source"
    source.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.ipynb")
    for name in (*SHARED, *SOURCES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    executed = sources().keys()
    for path in executed:
        (source / path).unlink()
        notebook = nbformat.read(executed_path(path), as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = point_to_notebooks(cell.source, path, executed)
        nbformat.write(notebook, source / path.with_suffix(".ipynb"))
    for page in source.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(point_to_notebooks(text, page.relative_to(source), executed), encoding="utf-8")
    return source


def build() -> bool:
    """Build the site from scratch: an incremental build would not repeat the warnings of unchanged pages."""
    if not execute():
        return False
    source = stage()
    strict = ["-W", "-n", "--keep-going", "--quiet"]
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", str(source), "--path-output", str(STAGE), *strict]
    if subprocess.call(command, cwd=ROOT) != 0:
        print("The site has warnings or errors, see above. site/ was not changed.", file=sys.stderr)
        return False
    shutil.rmtree(SITE, ignore_errors=True)
    (STAGE / "_build" / "html").replace(SITE)
    print(f"The site: {SITE.relative_to(ROOT)}/index.html (make serve shows it)")
    return True


def serve(port: int) -> bool:
    if not (SITE / "index.html").exists() and not build():
        return False
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"The book: http://127.0.0.1:{server.server_port}/ (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return True


def notebooks() -> bool:
    """Plain notebooks without outputs, for editors that don't open Markdown ones."""
    shutil.rmtree(NOTEBOOKS, ignore_errors=True)
    for path in filter(is_notebook, markdown_files()):
        target = NOTEBOOKS / path.relative_to(ROOT).with_suffix(".ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(read_source(path), target)
        print(target.relative_to(ROOT))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["execute", "build", "serve", "notebooks"])
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    commands = {
        "execute": execute,
        "build": build,
        "serve": functools.partial(serve, arguments.port),
        "notebooks": notebooks,
    }
    return 0 if commands[arguments.command]() else 1


if __name__ == "__main__":
    sys.exit(main())
