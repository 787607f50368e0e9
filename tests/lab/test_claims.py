import pytest

from polylib.lab import claim
from polylib.lab.claims import MIME, NOT_SHOWN, ClaimError


@pytest.fixture
def shown(monkeypatch):
    display = pytest.importorskip("IPython.display")
    cards = []
    monkeypatch.setattr(display, "display", cards.append)
    return cards


def test_a_claim_that_holds_is_recorded(shown):
    claim("C1", "quadratic < cubic & more", measured=0.71234, holds=True, margin="0.12 above")
    bundle = shown[0]._repr_mimebundle_()
    assert bundle[MIME]["status"] == "holds" and bundle[MIME]["measured"] == "0.712"
    assert "quadratic &lt; cubic &amp; more" in bundle["text/html"]
    assert "0.12 above" in bundle["text/plain"]


def test_a_claim_that_fails_is_shown_and_raises(shown):
    with pytest.raises(ClaimError, match="C2"):
        claim("C2", "faster", measured=1, holds=False)
    assert shown[0].record["status"] == "does not hold"


def test_what_cannot_be_shown_says_why(shown):
    claim("C3", "better on ImageNet", status=NOT_SHOWN, reason="needs ImageNet")
    assert shown[0].record["reason"] == "needs ImageNet"


def test_a_claim_that_is_not_asserted_is_recorded_with_its_reason(shown):
    claim("C4", "more accurate", measured=0.1, holds=False, margin=-0.2, otherwise="two seeds do not tell")
    claim("C5", "more accurate", measured=0.5, holds=True, margin=0.2, otherwise="two seeds do not tell")
    assert [card.record["status"] for card in shown] == [NOT_SHOWN, "holds"]
    assert [card.record["reason"] for card in shown] == ["two seeds do not tell", ""]
    assert [card.record["margin"] for card in shown] == ["", "0.2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": " "}, "id"),
        ({"statement": ""}, "statement"),
        ({}, "either holds or status"),
        ({"holds": True, "status": NOT_SHOWN}, "either holds or status"),
        ({"status": "maybe"}, "maybe"),
        ({"status": NOT_SHOWN}, "reason"),
    ],
)
def test_bad_arguments_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        claim(**{"id": "C1", "statement": "it works", **arguments})
