"""The fraction against a linear program and against the timeline, fitted times, streams, and bad input."""

import itertools

import pytest
import torch
from scipy.optimize import linprog

from polylib.sequences import fit_layer_time, layer_flops, optimal_swap_fraction, swap_timeline

GIB = 2.0**30


@pytest.mark.parametrize("time", [0.3, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("host", [70.0, 120.0, 500.0])
@pytest.mark.parametrize("n_layers", [2, 12, 32])
def test_the_fraction_is_that_of_a_linear_program(time, host, n_layers):
    s_in, s_attn, s_other, bandwidth = 1.0, 1.0, 14.0, 10.0
    found = optimal_swap_fraction(s_in, s_attn, s_other, bandwidth, time, host, n_layers)
    rows, limits = [[s_other]], [bandwidth * time - s_in - s_attn]
    if n_layers > 2:
        rows.append([(n_layers - 2) * s_other])
        limits.append(host - (n_layers - 2) * (s_in + s_attn))
    program = linprog([-1], A_ub=rows, b_ub=limits, bounds=[(0, 1)])
    assert found == pytest.approx(program.x[0], abs=1e-9)


def test_the_example_of_a_million_tokens():
    part = 2**20 * 4096 * 2 / 8
    assert optimal_swap_fraction(part, part, 14 * part, 1e12, 10.0, 2e12 / 8, 32) == pytest.approx(0.411, abs=0.001)


def test_no_fraction():
    with pytest.raises(ValueError, match=r"layer_time must be at least 0.2, or nothing can be swapped, got 0.1"):
        optimal_swap_fraction(1, 1, 14, 10, 0.1, 1e9, 32)
    with pytest.raises(ValueError, match="host_bytes must be at least 60"):
        optimal_swap_fraction(1, 1, 14, 10, 10, 59, 32)
    assert optimal_swap_fraction(1, 1, 14, 10, 10, 0, 2) == 1
    assert optimal_swap_fraction(1, 1, 0, 10, 10, 60, 32) == 1
    for k, name in enumerate(("s_in", "s_attn", "s_other", "bandwidth", "layer_time", "host_bytes", "n_layers")):
        arguments = [1, 1, 14, 10, 10, 1e9, 32]
        arguments[k] = -1
        with pytest.raises(ValueError, match=name):
            optimal_swap_fraction(*arguments)


def by_events(n, forward, backward, copy):
    """The same step from the rules alone: repeat until no start moves."""
    names = [("f", i) for i in range(n)] + [("b", i) for i in range(n)]
    names += [(kind, i) for kind in "op" for i in range(n - 2)]
    lasts = {"f": forward, "b": backward, "o": copy, "p": copy}
    after = {name: [] for name in names}
    for i in range(n):
        after["f", i] += [("f", i - 1)] if i else []
        after["f", i] += [("o", i - 2)] if i >= 2 else []
        after["b", i] += [("b", i + 1)] if i < n - 1 else [("f", i)]
        if i < n - 2:
            after["b", i].append(("p", i))
            after["o", i] += [("f", i), *([("o", i - 1)] if i else [])]
            after["p", i] += [("b", i + 2), ("o", i), *([("p", i + 1)] if i < n - 3 else [])]
    start = dict.fromkeys(names, 0.0)
    for _ in range(4 * n):
        for name in names:
            start[name] = max((start[own] + lasts[own[0]] for own in after[name]), default=0.0)
    return start


@pytest.mark.parametrize("copy", [0.0, 0.7, 1.0, 1.6, 5.0])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_timeline_follows_its_rules(n, copy):
    line, start = swap_timeline(n, 1.0, 2.2, copy), by_events(n, 1.0, 2.2, copy)
    order = [("f", i) for i in range(n)] + [("b", i) for i in reversed(range(n))]
    assert line.compute[:, 0].tolist() == pytest.approx([start[own] for own in order])
    assert line.offload[:, 0].tolist() == pytest.approx([start["o", i] for i in range(n - 2)])
    assert line.prefetch[:, 0].tolist() == pytest.approx([start["p", i] for i in reversed(range(n - 2))])
    assert line.total == pytest.approx(start["b", 0] + 2.2)
    assert line.stall == pytest.approx(line.total - 3.2 * n)


def test_nothing_waits_exactly_if_a_copy_takes_no_longer_than_a_layer():
    for n, copy in itertools.product((3, 8, 32), (0.5, 1.0)):
        assert swap_timeline(n, 1.0, 2.0, copy).stall == pytest.approx(0, abs=1e-12)
    for n in (4, 8, 32):
        assert swap_timeline(n, 1.0, 2.0, 1.1).stall == pytest.approx(0.1 * (n - 2))


def test_rounding_makes_no_negative_wait():
    """Seen in the figure of the chapter, which said -0 %."""
    stalls = [swap_timeline(32, 0.1 * k, 0.23 * k, 0.01 * k).stall for k in range(1, 60)]
    assert min(stalls) >= 0 and max(stalls) < 1e-9


def test_fitted_times():
    width, lengths = 64, [128, 512, 2048, 8192]
    rates = 3e10, 5e9
    times = [sum(f / r for f, r in zip(layer_flops(s, width), rates, strict=True)) for s in lengths]
    found = fit_layer_time(lengths, times, width)
    assert found == pytest.approx(rates, rel=1e-6)
    assert found.seconds(1000, width) == pytest.approx(24e3 * width**2 / 3e10 + 2e6 * width / 5e9)
    linear = fit_layer_time(lengths, [s * 1e-6 for s in lengths], width)
    assert linear.attention_rate > 1e4 * linear.matmul_rate
    for arguments in (([128], [1.0]), (lengths, times[:2]), ([1, 2], [1.0, 0.0]), ([0, 2], [1.0, 1.0])):
        with pytest.raises(ValueError, match=r"seconds|tokens"):
            fit_layer_time(*arguments, width)


def test_bad_timelines():
    for arguments, name in (((1, 1, 1, 1), "n_layers"), ((2, -1, 1, 1), "forward"), ((2, 1, 1, torch.nan), "copy")):
        with pytest.raises(ValueError, match=name):
            swap_timeline(*arguments)
