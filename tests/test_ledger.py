"""The ledger: every claim at both scales, to filter and to download."""

import importlib.util
import json
from pathlib import Path

import pytest

from polylib.lab.claims import HOLDS, MIME, NOT_BORNE_OUT, NOT_TESTED

ROOT = Path(__file__).resolve().parent.parent
TEXTS = """\
[C1]
paper = "a <b> better thing"
test = "by 0.1"
expected = "holds"

[C2]
paper = "at scale"
test = "at widths up to 128"
expected = "not tested here"
reason = "too small here"
"""


@pytest.fixture
def ledger():
    spec = importlib.util.spec_from_file_location("polylib_ledger", ROOT / "_ext" / "polylib_ledger.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def book(tmp_path: Path) -> Path:
    folder = tmp_path / "book" / "red"
    folder.mkdir(parents=True)
    chapters = "- {part: red, title: Red, about: x, chapters: [{slug: rose, title: The rose, question: q}]}\n"
    (tmp_path / "book" / "chapters.yml").write_text(chapters)
    (folder / "rose.claims.toml").write_text(TEXTS)
    record = {"id": "C1", "verdict": NOT_BORNE_OUT, "measured": "0.05", "margin": "-0.05"}
    notebook = {"metadata": {"polylib": {"code": "now"}}, "cells": [{"outputs": [{"data": {MIME: record}}]}]}
    (folder / "rose.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def record(book: Path, code: str) -> None:
    claims = {
        "C1": {"verdict": HOLDS, "measured": "0.2", "margin": "0.1"},
        "C2": {"verdict": HOLDS, "measured": "at 128, too", "margin": ""},
    }
    content = {"code": code, "date": "2026-01-01", "claims": claims}
    (book / "book" / "red" / "rose.laptop.json").write_text(json.dumps(content))


def test_without_a_record_there_is_one_scale(ledger, book: Path) -> None:
    rows, papers = ledger.rows_of_book(book)
    assert papers == 1 and [row["id"] for row in rows] == ["C1", "C2"]
    assert [row["ci"] for row in rows] == [NOT_BORNE_OUT, NOT_TESTED]
    assert {row["laptop"] for row in rows} == {ledger.NO_RECORD}


def test_both_scales_are_shown_and_a_record_of_older_code_is_marked(ledger, book: Path) -> None:
    record(book, "now")
    rows, papers = ledger.rows_of_book(book)
    page = ledger.page(rows, papers)
    assert [row["laptop"] for row in rows] == [HOLDS, HOLDS]
    assert "earlier version" not in page
    assert "a &lt;b&gt; better thing" in page and "red/rose.html#claim-C1" in page and "too small here" in page
    assert "2 of them are tested" in page and "2 hold and 0 are not borne" in page
    record(book, "before")
    assert "earlier version" in ledger.page(*ledger.rows_of_book(book))
