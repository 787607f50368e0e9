"""Claims: what a paper says, what was tested here, and what came out.

`book/<part>/<chapter>.claims.toml` holds, for each claim, what does not depend on a run: a table named by the claim's
id, with `paper` (what the paper says), `test` (what is measured and the threshold, fixed before looking), `expected`
(the verdict at scale `ci`) and, for a claim that is not tested there, `reason`. The chapter holds the rest: one call of
`claim` with what was measured.
"""

import html
import os
import re
import tomllib
from pathlib import Path
from typing import Any

MIME = "application/vnd.polylib.claim+json"
HOLDS, NOT_BORNE_OUT, NOT_TESTED = "holds", "not borne out here", "not tested here"
VERDICTS = {HOLDS: "#1a7f4b", NOT_BORNE_OUT: "#c62828", NOT_TESTED: "#6b6b6b"}  # and the colours of their cards
FIELDS = {"paper", "test", "expected", "reason"}


def read_claims(path: Path) -> dict[str, dict[str, str]]:
    """The claims file of a chapter: for each id `paper`, `test`, `expected` and `reason`; what is missing is empty.

    Raises:
        ValueError: a field that is unknown or not text, no `paper`, an unknown `expected`, no `reason` for a claim that
            is not tested, or no `test` for one that is.
    """
    try:
        claims = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error
    for id, fields in claims.items():
        where = f"{path.name}, {id}"
        if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError(f"{where} must be a table of texts, got {fields!r}")
        if unknown := sorted(fields.keys() - FIELDS):
            raise ValueError(f"{where}: the fields must be of {sorted(FIELDS)}, got {unknown}")
        if fields.get("expected") not in VERDICTS:
            raise ValueError(f"{where}: expected must be one of {list(VERDICTS)}, got {fields.get('expected')!r}")
        needed = ["paper", "reason" if fields["expected"] == NOT_TESTED else "test"]
        if missing := [name for name in needed if not fields.get(name, "").strip()]:
            raise ValueError(f"{where}: {missing[0]} must be some text, got none")
    return {id: {name: fields.get(name, "") for name in sorted(FIELDS)} for id, fields in claims.items()}


def records_of(notebook: dict[str, Any]) -> list[dict[str, str]]:
    """The records that `claim` left in the outputs of an executed notebook, in its order."""
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]


def by_number(id: str) -> list[int | str]:
    """A key that sorts C2 before C10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", id)]


def _beside_the_notebook() -> dict[str, dict[str, str]]:
    """The claims file of the notebook that runs, or nothing where it can't be told or read."""
    name = Path(os.environ.get("JPY_SESSION_NAME", "")).name.split(".")[0]  # set by JupyterLab's server
    files = [Path(f"{name}.claims.toml")] if name else sorted(Path().glob("*.claims.toml"))
    if len(files) != 1 or not files[0].is_file():
        return {}
    try:
        return read_claims(files[0])
    except (OSError, ValueError):  # a file that is being written; the check of the book says what is wrong with it
        return {}


def card(record: dict[str, str], texts: dict[str, str]) -> str:
    """A claim as HTML: the record of a run, with what the claims file says of it."""
    colour = VERDICTS[record["verdict"]]
    rows = {
        "The paper": texts.get("paper", ""),
        "Tested here": texts.get("test", "") if record["verdict"] != NOT_TESTED else "",
        "Measured": record["measured"],
        "Margin": record["margin"],
        "Why not": texts.get("reason", "") if record["verdict"] == NOT_TESTED else "",
    }
    lines = "".join(
        f'<div><span style="opacity:.75">{name}:</span> {html.escape(text)}</div>'
        for name, text in rows.items()
        if text
    )
    return (
        f'<div class="polylib-claim" id="claim-{html.escape(record["id"])}" style="border:1px solid {colour};'
        f' border-left-width:6px; border-radius:4px; padding:.6em 1em; margin:.6em 0; line-height:1.45">'
        f'<div><strong>{html.escape(record["id"])}</strong> <span style="background:{colour}; color:#fff;'
        f' border-radius:3px; padding:.1em .5em; font-size:.85em">{record["verdict"]}</span></div>{lines}</div>'
    )


class _Card:
    """The record of one claim, as it shows in a notebook."""

    def __init__(self, record: dict[str, str], texts: dict[str, str]) -> None:
        self.record = record
        self.texts = texts

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {MIME: self.record, "text/html": card(self.record, self.texts), "text/plain": str(self)}

    def __str__(self) -> str:
        parts = [f"[{self.record['verdict']}] {self.record['id']}", self.texts.get("paper", "")]
        parts += [f"{key}: {self.record[key]}" for key in ("measured", "margin") if self.record[key]]
        return "\n  ".join(filter(None, parts))


def claim(id: str, holds: bool | None = None, measured: str | float = "", margin: str | float = "") -> None:
    """Show what became of a claim, and keep its record in the output of the notebook, where the ledger finds it.

    A claim that is not borne out stops nothing.

    Args:
        id: the name of the claim in the chapter's claims file, such as `"C1"`.
        holds: whether the measurement bears the claim out; None if it is not tested at this scale.
        measured: what was measured here, in words or as a number.
        margin: how far the measurement is from the point where the verdict would change.

    Raises:
        ValueError: an empty `id`, or a tested claim without `measured`.
        TypeError: `holds` is not a truth value.
    """
    if not isinstance(id, str) or not id.strip():
        raise ValueError(f"id must be some text, got {id!r}")
    if holds is not None and str(getattr(holds, "dtype", type(holds).__name__)) not in ("bool", "torch.bool"):
        raise TypeError(f"holds must be True, False or None, got {holds!r}")
    words = {
        name: v if isinstance(v, str) else f"{float(v):.3g}" for name, v in (("measured", measured), ("margin", margin))
    }
    if holds is not None and not words["measured"].strip():
        raise ValueError(f"measured must say what was measured for {id}, got {measured!r}")
    verdict = NOT_TESTED if holds is None else HOLDS if bool(holds) else NOT_BORNE_OUT
    shown = _Card({"id": id, "verdict": verdict, **words}, _beside_the_notebook().get(id, {}))
    try:
        from IPython.display import display
    except ImportError:
        print(shown)
    else:
        display(shown)
