"""Claims: what a paper says, what was measured here, and whether the one bears the other out."""

import html
from typing import Any

MIME = "application/vnd.polylib.claim+json"
NOT_SHOWN = "not shown at this scale"


class ClaimError(AssertionError):
    """A claim that the chapter asserts does not hold in this run."""


class _Card:
    """The record of one claim, as it shows in a notebook."""

    def __init__(self, record: dict[str, str]) -> None:
        self.record = record

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {MIME: self.record, "text/html": self.html(), "text/plain": str(self)}

    def __str__(self) -> str:
        parts = [f"[{self.record['status']}] {self.record['id']}: {self.record['statement']}"]
        parts += [f"  {key}: {self.record[key]}" for key in ("measured", "margin", "reason") if self.record[key]]
        return "\n".join(parts)

    def html(self) -> str:
        status, colour = (
            self.record["status"],
            {"holds": "#1a7f4b", "does not hold": "#c62828"}.get(self.record["status"], "#9a6700"),
        )
        rows = "".join(
            f'<div><span style="opacity:.75">{key.capitalize()}:</span> {html.escape(self.record[key])}</div>'
            for key in ("measured", "margin", "reason")
            if self.record[key]
        )
        return (
            f'<div class="polylib-claim" style="border:1px solid {colour}; border-left-width:6px; border-radius:4px;'
            f' padding:.6em 1em; margin:.6em 0; line-height:1.45">'
            f'<div><strong>{html.escape(self.record["id"])}</strong> <span style="background:{colour}; color:#fff;'
            f' border-radius:3px; padding:.1em .5em; font-size:.85em">{status}</span></div>'
            f"<div>{html.escape(self.record['statement'])}</div>{rows}</div>"
        )


def claim(
    id: str,
    statement: str,
    measured: str | float = "",
    holds: bool | None = None,
    margin: str | float = "",
    *,
    status: str = "",
    reason: str = "",
    otherwise: str = "",
) -> None:
    """Show a claim as a card, and keep its record in the output of the notebook, where the ledger finds it.

    Args:
        id: the name of the claim within its chapter, such as `"C1"`.
        statement: what is claimed, in one sentence.
        measured: what was measured here, in words or as a number.
        holds: whether the measurement bears the claim out.
        margin: the distance from the measurement to the point where it would not.
        status: `"not shown at this scale"` for a claim that this page can't test; then `reason` says why.
        otherwise: for a claim that is tested but not asserted: the reason to record, as not shown at this scale, if
            `holds` is false. Nothing is raised then.

    Raises:
        ClaimError: `holds` is false, with no `otherwise`. The card is shown and stored first.
        ValueError: an empty `id` or `statement`, an unknown `status`, neither or both of `holds` and `status`, or no
        `reason`.
    """
    for name, value in (("id", id), ("statement", statement)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {value!r}; expected some text")
    if status not in ("", NOT_SHOWN):
        raise ValueError(f"status is {status!r}; expected {NOT_SHOWN!r} or nothing")
    if (holds is None) == (status == ""):
        raise ValueError(f"expected either holds or status={NOT_SHOWN!r}")
    if otherwise and holds is not None and not bool(holds):
        holds, status, reason, margin = None, NOT_SHOWN, otherwise, ""
    if status and not reason.strip():
        raise ValueError(f"reason is empty; a claim that is {NOT_SHOWN} needs one")
    verdict = status or ("holds" if bool(holds) else "does not hold")
    words = {
        name: v if isinstance(v, str) else f"{float(v):.3g}" for name, v in (("measured", measured), ("margin", margin))
    }
    card = _Card({"id": id, "statement": statement, **words, "status": verdict, "reason": reason})
    try:
        from IPython.display import display
    except ImportError:
        print(card)
    else:
        display(card)
    if verdict == "does not hold":
        raise ClaimError(str(card))
