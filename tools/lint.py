"""Ruff over the library, the tests, the tools and the code cells of the chapters; and what a page can show.

python -m tools.lint          check
python -m tools.lint --fix    format everything, the cells of the chapters too

Ruff reads notebooks, not MyST Markdown: each chapter is handed over as a notebook, and what ruff says about a cell is
printed with its line in the Markdown file.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from tools import chapters
from tools.sources import ROOT, is_notebook, markdown_files

FENCE = re.compile(r"^(`{3,})\{code-cell\}")
WIDTH, HEIGHT = 84, 15  # what a page shows of a line, and the lines of a visible cell


def ruff(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def cells(lines: list[str]) -> list[tuple[int, int]]:
    """First line and end (exclusive) of the code in each code cell, counted from 0."""
    found = []
    number = 0
    while number < len(lines):
        if match := FENCE.match(lines[number]):
            start = number + 1
            if start < len(lines) and lines[start].strip() == "---":
                start = lines.index("---", start + 1) + 1
            while lines[start].startswith(":"):
                start += 1
            while not lines[start].strip():
                start += 1
            number = start
            while lines[number].rstrip() != match[1]:
                number += 1
            found.append((start, number))
        number += 1
    return found


def too_large() -> list[str]:
    """Cells that a page can't show whole: lines that are too long, and visible cells of too many lines."""
    found = []
    for path in filter(is_notebook, markdown_files()):
        lines = path.read_text(encoding="utf-8").splitlines()
        for start, end in cells(lines):
            where = f"{path.relative_to(ROOT)}:{start + 1}"
            fence = max(n for n in range(start) if FENCE.match(lines[n]))
            folded = any("hide-" in line or "remove-" in line for line in lines[fence:start])
            if end - start > HEIGHT and not folded:
                found.append(f"{where}: a visible cell of {end - start} lines, at most {HEIGHT}")
            found += [
                f"{path.relative_to(ROOT)}:{n + 1}: {len(lines[n])} characters in a cell, at most {WIDTH}"
                for n in range(start, end)
                if len(lines[n]) > WIDTH
            ]
    return found


def check_chapters(fix: bool) -> bool:
    """Check, or rewrite, the cells of every chapter. True if they are clean."""
    chapters = [path for path in markdown_files() if is_notebook(path)]
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, path in enumerate(chapters):
            lines = path.read_text(encoding="utf-8").splitlines()
            code = ["\n".join(lines[start:end]) for start, end in cells(lines)]
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in code])
            notebook.metadata.language_info = {"name": "python"}
            files[f"{number}.ipynb"] = path
            nbformat.write(notebook, Path(folder, f"{number}.ipynb"))
        if not files:
            return True
        config = ["--config", str(ROOT / "pyproject.toml"), "--line-length", str(WIDTH), "--no-cache", folder]
        fixing = ["--fix"] if fix else []
        if fix:
            ruff("format", *config)
        for item in json.loads(ruff("check", "--output-format=json", *fixing, *config).stdout):
            path = files[Path(item["filename"]).name]
            start = cells(path.read_text(encoding="utf-8").splitlines())[item["cell"] - 1][0]
            line = start + item["location"]["row"]
            print(f"{path.relative_to(ROOT)}:{line}: {item['code']} {item['message']}")
            clean = False
        ruff("format", *config)
        for name, path in files.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            code = [cell.source for cell in nbformat.read(Path(folder, name), as_version=4).cells]
            for (start, end), source in reversed(list(zip(cells(lines), code, strict=True))):
                if lines[start:end] == source.splitlines():
                    continue
                if not fix:
                    print(f"{path.relative_to(ROOT)}:{start + 1}: the cell is not formatted (make format)")
                    clean = False
                lines[start:end] = source.splitlines()
            if fix:
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return clean


def main(arguments: list[str]) -> int:
    fix = "--fix" in arguments
    if fix:
        chapters.main()
    runs = (
        [ruff("check", "--fix", "."), ruff("format", ".")]
        if fix
        else [ruff("check", "."), ruff("format", "--diff", ".")]
    )
    for run in runs:
        print((run.stdout + run.stderr).strip())
    clean = check_chapters(fix)
    wrong = [*too_large(), *chapters.misfits()]
    print(*wrong, sep="\n")
    return 0 if clean and not wrong and not any(run.returncode for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
