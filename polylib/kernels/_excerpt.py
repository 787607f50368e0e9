"""The few lines of a kernel that a chapter shows, taken from its file."""

from __future__ import annotations

import textwrap
from pathlib import Path

BEGIN, END = "# excerpt: begin", "# excerpt: end"


def excerpt(op_name: str) -> str:
    """Return the marked lines of an op's file, without their common indentation.

    Args:
        op_name: the name of a file of `polylib.kernels`, such as "poly_relu".

    Raises:
        ValueError: there is no such op, or nothing in its file is marked.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))
    if op_name not in names:
        raise ValueError(f"op_name must be one of {', '.join(names)}, got {op_name!r}")
    source = (folder / f"{op_name}.py").read_text(encoding="utf-8")
    if source.count(BEGIN) != 1 or source.count(END) != 1:
        raise ValueError(f"op_name must be an op whose file marks one excerpt, got {op_name!r}")
    lines = source.partition(BEGIN)[2].partition(END)[0].splitlines()[1:-1]
    return textwrap.dedent("\n".join(lines)).strip("\n")
