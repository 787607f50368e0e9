from pathlib import Path

import numpy as np
import pytest
import torch

from polylib.lab import claim
from polylib.lab.claims import HOLDS, MIME, NOT_BORNE_OUT, NOT_TESTED, read_claims

FILE = """\
[C1]
paper = "quadratic < cubic & more"
test = "the mean of five seeds is above 0.6"
expected = "holds"

[C2]
paper = "better on ImageNet"
expected = "not tested here"
reason = "it takes ImageNet"
"""


@pytest.fixture
def shown(monkeypatch, tmp_path):
    display = pytest.importorskip("IPython.display")
    cards = []
    monkeypatch.setattr(display, "display", cards.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return cards


def write(name: str, text: str = FILE) -> Path:
    path = Path(f"{name}.claims.toml")
    path.write_text(text, encoding="utf-8")
    return path


def test_a_claim_shows_what_was_measured_beside_what_the_paper_says(shown):
    write("chapter")
    claim("C1", True, measured=0.71234, margin="0.11 above")
    bundle = shown[0]._repr_mimebundle_()
    assert bundle[MIME] == {"id": "C1", "verdict": HOLDS, "measured": "0.712", "margin": "0.11 above"}
    for words in ("quadratic &lt; cubic &amp; more", "the mean of five seeds", "0.712", "0.11 above"):
        assert words in bundle["text/html"]
    assert "quadratic < cubic" in bundle["text/plain"]


def test_a_claim_that_fails_keeps_its_numbers_and_stops_nothing(shown):
    claim("C1", holds=False, measured="0.5 against 0.6", margin=-0.1)
    assert shown[0].record == {"id": "C1", "verdict": NOT_BORNE_OUT, "measured": "0.5 against 0.6", "margin": "-0.1"}


def test_a_claim_that_is_not_tested_shows_the_reason_and_no_test(shown):
    write("chapter")
    claim("C2")
    assert shown[0].record["verdict"] == NOT_TESTED
    assert "it takes ImageNet" in shown[0]._repr_mimebundle_()["text/html"]


def test_the_file_of_the_running_notebook_is_found_among_others(shown, monkeypatch):
    write("one", FILE.replace("quadratic", "linear"))
    write("two")
    claim("C1", True, measured=1)
    assert "paper" not in shown[0].texts  # which of the two can't be told
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/book/two.md")
    claim("C1", True, measured=1)
    assert shown[1].texts["paper"] == "quadratic < cubic & more"


def test_a_broken_file_costs_the_text_and_not_the_run(shown):
    write("chapter", "[C1")
    claim("C1", True, measured=1)
    assert shown[0].record["verdict"] == HOLDS


@pytest.mark.parametrize("holds", [np.bool_(True), torch.tensor(3.0) > 2, np.array(1.0) > 0])
def test_truth_values_of_arrays_count(shown, holds):
    claim("C1", holds, measured=1)
    assert shown[0].record["verdict"] == HOLDS


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"id": " "}, ValueError, "id"),
        ({"measured": ""}, ValueError, "measured"),
        ({"holds": 0.3}, TypeError, "holds"),
        ({"holds": "a statement"}, TypeError, "holds"),
    ],
)
def test_bad_arguments_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        claim(**{"id": "C1", "holds": True, "measured": 1.0, **arguments})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[C1", "chapter.claims.toml"),
        ('C1 = "it works"', "C1 must be a table"),
        (FILE.replace("test =", "tests ="), "tests"),
        (FILE.replace('"holds"', '"maybe"'), "maybe"),
        (FILE.replace("it takes ImageNet", " "), "C2: reason"),
        (FILE.replace("the mean of five seeds is above 0.6", ""), "C1: test"),
        (FILE.replace("quadratic < cubic & more", ""), "C1: paper"),
    ],
)
def test_a_claims_file_with_a_fault_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "chapter.claims.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_claims(path)


def test_a_claims_file_is_read(tmp_path):
    path = tmp_path / "chapter.claims.toml"
    path.write_text(FILE, encoding="utf-8")
    claims = read_claims(path)
    assert list(claims) == ["C1", "C2"]
    assert claims["C1"]["expected"] == "holds" and claims["C1"]["reason"] == ""
    assert claims["C2"]["reason"] == "it takes ImageNet"
