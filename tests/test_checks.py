"""The checks of arguments: what passes, what does not, and the one way in which it is said."""

import numpy as np
import pytest
import torch

from polylib import _checks


def test_what_fits_comes_back_as_pythons_own_number():
    assert type(_checks.integer("n", np.int64(3), least=1)) is int
    assert type(_checks.number("rate", torch.tensor(0.5), above=0)) is float
    assert _checks.multiple("dim", 12, "heads", 4) == 12 and _checks.divisor("groups", 4, "dim", 12) == 4
    assert _checks.floating("dtype", None) is None and _checks.choice("kind", "a", ("a", "b")) == "a"


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: _checks.integer("n", 0, least=1), "n must be an integer of at least 1, got 0"),
        (lambda: _checks.integer("n", 2.0), r"n must be an integer, got 2\.0"),
        (lambda: _checks.integer("n", True, 0, 1), "n must be an integer from 0 to 1, got True"),
        (lambda: _checks.integer("n", np.True_, 0, 1), "n must be an integer from 0 to 1, got "),
        (lambda: _checks.integer("n", "3", most=4), "n must be an integer of at most 4, got '3'"),
        (lambda: _checks.number("p", 1, below=1, least=0), "p must be a finite number below 1, at least 0, got 1"),
        (lambda: _checks.number("p", 2, least=0, most=1), "p must be a finite number from 0 to 1, got 2"),
        (lambda: _checks.number("p", float("nan")), "p must be a finite number, got nan"),
        (lambda: _checks.number("p", "0.5", above=0), "p must be a finite number above 0, got '0.5'"),
        (lambda: _checks.number("p", torch.zeros(2)), "p must be a finite number, got tensor"),
        (lambda: _checks.choice("kind", 1.0, (1, 2)), r"kind must be one of 1, 2, got 1\.0"),
        (lambda: _checks.multiple("dim", 10, "heads", 4), "dim must be a multiple of heads = 4, got 10"),
        (lambda: _checks.multiple("dim", 10, "heads", 0), "heads must be an integer of at least 1, got 0"),
        (lambda: _checks.divisor("groups", 0, "dim", 4), "groups must be a divisor of dim = 4, got 0"),
        (lambda: _checks.shape("x", torch.zeros(2, 3), "(N, 4)", False), r"x must have shape \(N, 4\), got \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected_and_given(check, words):
    with pytest.raises(ValueError, match=words):
        check()


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, got torch\.int64"):
        _checks.floating("dtype", torch.int64)
    with pytest.raises(TypeError, match="run must be a function, got 3"):
        _checks.function("run", 3)
