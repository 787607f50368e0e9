"""The notebooks and the site.

python -m tools.book execute             run the chapters and labs whose code, modules or scale changed
python -m tools.book build               execute, then build the site into site/
python -m tools.book chapter NAME        execute one chapter or lab and build its page, such as neurons/polycom
python -m tools.book serve [--port N]    show the site on this machine
python -m tools.book notebooks           write plain .ipynb copies into notebooks/
"""

import argparse
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import nbformat

from polylib.lab.claims import read_claims
from tools.execute import execute, executed_path, report
from tools.record import code_digest
from tools.sources import ROOT, SOURCES, find, is_notebook, markdown_files, read_source, sources
from tools.verdicts import claims_file, with_texts

STAGE = ROOT / ".site"
SITE = ROOT / "site"
ONE = STAGE / "one"  # the page of `chapter`
NOTEBOOKS = ROOT / "notebooks"
LINK = re.compile(r"\]\(([^)#\s:]+\.md)")
SHARED = ("_config.yml", "_toc.yml", "references.bib", "_ext", "_static", "_templates")


def point_to_notebooks(text: str, page: Path, executed: Collection[Path]) -> str:
    """Links to a .md file that is staged as an executed notebook lead to the notebook."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[1]))
        return f"]({match[1].removesuffix('.md')}.ipynb" if target in executed else match[0]

    return LINK.sub(link, text)


def staged_notebook(path: Path, executed: Collection[Path]) -> nbformat.NotebookNode:
    """An executed notebook as the site shows it: links, the text of claims, and what the ledger needs to know."""
    notebook = nbformat.read(executed_path(path), as_version=4)
    if claims_file(path).exists():
        notebook = with_texts(notebook, read_claims(claims_file(path)))
    notebook.metadata.polylib.code = code_digest(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = point_to_notebooks(cell.source, path, executed)
    return notebook


def stage() -> Path:
    """Copy what the site is made of, with the executed notebooks in place of their sources.

    A notebook that is not executed, since a cell of it failed, is staged without outputs.
    """
    shutil.rmtree(STAGE, ignore_errors=True)
    source = STAGE / "source"
    source.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.ipynb")
    for name in (*SHARED, *SOURCES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    executed = [path for path in sources() if executed_path(path).exists()]
    for path in executed:
        (source / path).unlink()
        nbformat.write(staged_notebook(path, executed), source / path.with_suffix(".ipynb"))
    for page in source.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(point_to_notebooks(text, page.relative_to(source), executed), encoding="utf-8")
    return source


def digest_of(folder: Path) -> str:
    """Digest of all that a site is made of: the staged files, the library that its API pages show, and the versions."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [ROOT / "constraints.txt", *(path for path in (ROOT / "polylib").rglob("*") if path.suffix != ".pyc")]
    total = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        total.update(f"\0{path.relative_to(ROOT)}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def is_built() -> bool:
    """True if site/ holds what was staged last."""
    mark = SITE / ".made-of"
    source = STAGE / "source"
    return mark.exists() and source.exists() and mark.read_text(encoding="utf-8") == digest_of(source)


def jupyter_book(source: Path, output: Path, *options: str) -> bool:
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), "--path-output", str(output)]
    return subprocess.call([*command, *options], cwd=ROOT) == 0


def build(executed: bool = False) -> bool:
    """Build the site, whatever the verdicts are, from scratch: only so are all warnings seen.

    A site that was made of the same files stays. False if a notebook failed or the site has warnings.
    """
    clean = executed or not report(execute())
    source = stage()
    if is_built():
        print(f"The site is up to date: {SITE.relative_to(ROOT)}/index.html")
        return clean
    if not jupyter_book(source, STAGE, "-W", "-n", "--keep-going", "--quiet"):
        print("The site has warnings or errors, see above. site/ was not changed.", file=sys.stderr)
        return False
    shutil.rmtree(SITE, ignore_errors=True)
    (STAGE / "_build" / "html").replace(SITE)
    (SITE / ".made-of").write_text(digest_of(source), encoding="utf-8")
    print(f"The site: {SITE.relative_to(ROOT)}/index.html (make serve shows it)")
    return clean


def chapter(name: str) -> bool:
    """Execute one chapter or lab and build its page alone. Links to other pages lead nowhere there."""
    notebooks = find([name])
    path = next(iter(notebooks))
    clean = not report(execute(notebooks))
    source = stage()
    shutil.copytree(source, ONE / "source", dirs_exist_ok=True)
    contents = f"format: jb-book\nroot: {path.with_suffix('').as_posix()}\nchapters:\n  - file: book/bibliography\n"
    (ONE / "source" / "_toc.yml").write_text(contents, encoding="utf-8")
    built = jupyter_book(ONE / "source", ONE, "--quiet")
    page = ONE / "_build" / "html" / path.with_suffix(".html")
    print(f"The page: {page.relative_to(ROOT)}")
    return clean and built


def serve(port: int) -> bool:
    if not (SITE / "index.html").exists() and not build():
        return False
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    try:
        http_server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        print(
            f"Port {port} can't be used ({error.strerror}); name another: make serve ARGS='--port 8001'",
            file=sys.stderr,
        )
        return False
    with http_server as server:
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
    parser.add_argument("command", choices=["execute", "build", "chapter", "serve", "notebooks"])
    parser.add_argument("name", nargs="?", help="of the chapter")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if (arguments.command == "chapter") != bool(arguments.name):
        parser.error("`chapter` takes the name of one, such as neurons/polycom; the others take none")
    commands = {
        "execute": lambda: not report(execute()),
        "build": build,
        "chapter": functools.partial(chapter, arguments.name),
        "serve": functools.partial(serve, arguments.port),
        "notebooks": notebooks,
    }
    return 0 if commands[arguments.command]() else 1


if __name__ == "__main__":
    sys.exit(main())
