"""Claims against what the files expect, over processors, and in the ledger."""

import re
from pathlib import Path

import nbformat
import pytest

from polylib.lab.claims import HOLDS, MIME, NOT_BORNE_OUT, NOT_TESTED
from tools import check, execute, robust, sources, verdicts

TEXTS = """\
[C1]
paper = "it is better"
test = "by 0.1 in the mean of five seeds"
expected = "holds"

[C2]
paper = "at scale, too"
expected = "not tested here"
reason = "there is no such machine here"

[C10]
paper = "and faster"
test = "by a third"
expected = "not borne out here"
"""
CHAPTER = Path("book/part/chapter.md")


def notebook_with(records: dict[str, str]) -> nbformat.NotebookNode:
    cells = []
    for id, verdict in records.items():
        record = {"id": id, "verdict": verdict, "measured": f"{id} measured", "margin": "0.1"}
        output = nbformat.v4.new_output("display_data", {MIME: record, "text/html": "an old card"})
        cells.append(nbformat.v4.new_code_cell(outputs=[output]))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.polylib = {"digest": ""}
    return notebook


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a claims file and an executed notebook, and returns what the check says."""
    for module in (execute, sources, verdicts):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "EXECUTED", tmp_path / ".executed")

    def check_it(records: dict[str, str], texts: str = TEXTS) -> tuple[int, list[str]]:
        path = verdicts.claims_file(CHAPTER)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts, encoding="utf-8")
        execute.write_atomic(notebook_with(records), execute.executed_path(CHAPTER))
        return verdicts.check([CHAPTER])

    return check_it


def test_what_comes_out_as_expected_passes(chapter) -> None:
    assert chapter({"C1": HOLDS, "C10": NOT_BORNE_OUT}) == (2, [])
    assert chapter({"C1": HOLDS, "C2": NOT_TESTED, "C10": NOT_BORNE_OUT}) == (3, [])


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"C1": NOT_BORNE_OUT, "C10": NOT_BORNE_OUT}, "C1 expected 'holds', found 'not borne out here'.*C1 measured"),
        ({"C1": HOLDS, "C10": HOLDS}, "C10 expected"),  # one that came out better than expected is news as well
        ({"C1": HOLDS}, "C10 is not in the chapter"),
        ({"C1": HOLDS, "C10": NOT_BORNE_OUT, "C11": HOLDS}, "C11 is not in the claims file"),
    ],
)
def test_a_difference_is_found_and_named(chapter, records: dict[str, str], words: str) -> None:
    _, wrong = chapter(records)
    assert len(wrong) == 1 and re.search(words, wrong[0])


def test_a_claim_that_appears_twice_is_found(chapter) -> None:
    chapter({"C1": HOLDS, "C10": NOT_BORNE_OUT})
    twice = notebook_with({"C1": HOLDS, "C10": NOT_BORNE_OUT})
    twice.cells += notebook_with({"C1": HOLDS}).cells
    execute.write_atomic(twice, execute.executed_path(CHAPTER))
    _, wrong = verdicts.check([CHAPTER])
    assert len(wrong) == 1 and "C1 appears 2 times" in wrong[0]


def test_a_notebook_that_did_not_run_has_no_verdicts(chapter) -> None:
    chapter({"C1": HOLDS, "C10": NOT_BORNE_OUT})
    execute.executed_path(CHAPTER).unlink()
    assert "not executed" in verdicts.check([CHAPTER])[1][0]


def test_a_broken_claims_file_is_one_sentence(chapter) -> None:
    _, wrong = chapter({}, TEXTS.replace('"holds"', '"perhaps"'))
    assert len(wrong) == 1 and "perhaps" in wrong[0]


def test_cards_follow_the_claims_file_without_a_run() -> None:
    notebook = verdicts.with_texts(notebook_with({"C1": HOLDS}), {"C1": {"paper": "newer words", "test": ""}})
    html = notebook.cells[0].outputs[0].data["text/html"]
    assert "newer words" in html and "C1 measured" in html


def test_verdicts_that_differ_over_processors_come_first() -> None:
    def record(verdict: str) -> dict[str, str]:
        return {"verdict": verdict, "measured": f"for {verdict}", "margin": ""}

    found = {way: {("a", "C1"): record(HOLDS), ("a", "C2"): record(HOLDS)} for way in robust.WAYS}
    assert robust.table(found)[1] == 0
    found["avx2"]["a", "C2"] = record(NOT_BORNE_OUT)
    lines, differ = robust.table(found)
    assert differ == 1 and "C2" in lines[0] and f"for {NOT_BORNE_OUT}" in lines[2]
    del found["own"]["a", "C1"]
    assert robust.table(found)[1] == 2


def test_every_stage_runs_and_one_table_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.pace, "measure", lambda: 1.0)
    ran = []

    def stage(name: str, outcome: check.Outcome | None):
        def run() -> check.Outcome:
            ran.append(name)
            if outcome is None:
                raise OSError("the disk is full")
            return outcome

        return run

    stages = {
        "first": stage("first", check.Outcome(3, 1, "the first lines")),
        "second": stage("second", None),
        "third": stage("third", check.Outcome(5, 0)),
    }
    rows = check.run(stages)
    assert ran == ["first", "second", "third"]
    table = check.table(rows)
    assert [row.outcome.failed for row in rows] == [1, 1, 0]
    assert "the first lines" in table and "the disk is full" in table and len(table.splitlines()) == 5
