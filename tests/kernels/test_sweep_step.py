"""sweep_step: both paths against torch's own optimizers, the Triton path against float64, checks, cost."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from polylib.kernels import sweep_adam_step, sweep_sgd_step

# Relative to the largest term of each entry. float32: some twelve roundings of 2^-24 a step, over three steps. Half
# precisions: each of three steps rounds once, by 2^-11 or (as the interpreter truncates to bfloat16) 2^-7.
TOLERANCE = {torch.float32: 2**-18, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
STEPS = 3


class Stack:
    """K stacked models, and what a step of one of the optimizers needs for them."""

    def __init__(self, optimizer, *shape, dtype=torch.float32, state=torch.float32, device="cpu", extras=True):
        gen = torch.Generator().manual_seed(0)
        self.optimizer, self.rows = optimizer, shape[0]
        self.parameter = torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype)
        self.gradients = [
            torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype) for _ in range(STEPS)
        ]
        self.state = [torch.zeros(shape, dtype=state, device=device) for _ in range(2)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rate, decay, scale = torch.rand(3, shape[0], generator=gen, dtype=torch.float64).to(device, wide) + 0.1
        self.rate, self.decay, self.scale = 0.1 * rate, *((decay, scale) if extras else (None, None))

    def step(self, t, backend="auto", function=None):
        beside = {"decay": self.decay, "scale": self.scale, "backend": backend}
        if self.optimizer == "adam":
            call = function or sweep_adam_step
            both = (self.parameter, self.gradients[t], *self.state)
            return call(*both, self.rate, step=t + 1, betas=(0.8, 0.9), epsilon=1e-3, **beside)
        velocity = {"velocity": self.state[0], "momentum": 0.9} if self.optimizer == "momentum" else {}
        return (function or sweep_sgd_step)(self.parameter, self.gradients[t], self.rate, **velocity, **beside)

    def run(self, backend="auto"):
        """Take three steps. Returns what changes."""
        for t in range(STEPS):
            self.step(t, backend)
        return [self.parameter, *self.state]

    def widened(self):
        """The same values in float64."""
        other = Stack(self.optimizer, *self.parameter.shape)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = value.double()
            elif isinstance(value, list):
                value = [t.double() for t in value]
            setattr(other, name, value)
        return other

    def one_by_one(self):
        """The parameters after the same steps of a torch optimizer in each model."""
        rows = []
        for k in range(self.rows):
            row = self.parameter[k].clone().requires_grad_()
            decay = 0.0 if self.decay is None else self.decay[k].item()
            options = {"lr": self.rate[k].item(), "weight_decay": decay}
            if self.optimizer == "adam":
                torch_optimizer = torch.optim.AdamW([row], betas=(0.8, 0.9), eps=1e-3, **options)
            else:
                torch_optimizer = torch.optim.SGD([row], momentum=0.9 * (self.optimizer == "momentum"), **options)
            for gradient in self.gradients:
                row.grad = gradient[k] * (1.0 if self.scale is None else self.scale[k])
                torch_optimizer.step()
            rows.append(row.detach())
        return torch.stack(rows)


@OPTIMIZERS
@pytest.mark.parametrize("extras", [True, False], ids=["decay and scale", "plain"])
def test_the_reference_is_torchs_optimizer_row_by_row(optimizer, extras):
    stack = Stack(optimizer, 4, 3, 2, dtype=torch.float64, state=torch.float64, extras=extras)
    expected = stack.one_by_one()
    torch.testing.assert_close(stack.run()[0], expected, rtol=1e-12, atol=1e-12)


@OPTIMIZERS
@DTYPES
@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 5, 9), (1, 1024), (2, 1025), (5, 3000)], ids=str)
def test_triton_equals_float64_reference(optimizer, dtype, shape, device):
    stack = Stack(optimizer, *shape, dtype=dtype, device=device)
    expected = stack.widened().run("reference")
    for a, e in zip(stack.run("triton"), expected, strict=True):
        # The decay carries the rounding of the parameter into the velocity, but not into Adam's moments.
        tolerance = TOLERANCE[a.dtype if optimizer == "adam" else dtype]
        # Terms of a step are of the order of the values themselves, here all of order one.
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=3 * tolerance)


@OPTIMIZERS
def test_state_may_be_narrow_and_decay_and_scale_absent(optimizer, device):
    stack = Stack(optimizer, 3, 50, state=torch.bfloat16, device=device, extras=False)
    expected = stack.widened().run("reference")
    for a, e in zip(stack.run("triton"), expected, strict=True):
        # Adam divides one rounded moment by the root of another: an entry may be off by a few roundings of 2^-7.
        torch.testing.assert_close(a.double(), e, rtol=8 * 2**-7, atol=8 * 2**-7)


@OPTIMIZERS
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_half_precision_is_rounded_once_a_step(optimizer, backend, device):
    stack = Stack(optimizer, 2, 40, dtype=torch.float16, device=device)
    wide = stack.widened()
    stack.step(0, backend)
    wide.step(0, "reference")
    torch.testing.assert_close(stack.parameter, wide.parameter.half(), rtol=2**-10, atol=2**-20)


@OPTIMIZERS
def test_strided_gradient(optimizer, device):
    a, b = Stack(optimizer, 4, 6, device=device), Stack(optimizer, 4, 6, device=device)
    b.gradients = [g.t().contiguous().t() for g in b.gradients]
    assert not b.gradients[0].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(a.run("triton"), b.run("triton"), strict=True))


@OPTIMIZERS
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_entries(optimizer, shape, backend, device):
    assert Stack(optimizer, *shape, device=device).run(backend)[0].shape == shape


@OPTIMIZERS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -0.0, float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_row_that_diverges_leaves_the_others_alone(optimizer, value, backend, device):
    calm, wild = Stack(optimizer, 3, 5, device=device), Stack(optimizer, 3, 5, device=device)
    for gradient in wild.gradients:
        gradient[1] = value
    reference = Stack(optimizer, 3, 5, device=device)
    reference.gradients = wild.gradients
    after, expected = wild.run(backend)[0], calm.run(backend)[0]
    assert torch.equal(after[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(after[1], reference.run("reference")[0][1], equal_nan=True)


@OPTIMIZERS
def test_only_the_tensors_to_change_are_changed(optimizer, device):
    stack = Stack(optimizer, 3, 5, device=device)
    kept = [t.clone() for t in (*stack.gradients, stack.rate, stack.decay, stack.scale)]
    stack.run("triton")
    assert all(map(torch.equal, (*stack.gradients, stack.rate, stack.decay, stack.scale), kept))


@OPTIMIZERS
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_trained_parameters_are_changed_without_a_graph(optimizer, backend, device):
    stack = Stack(optimizer, 3, 5, device=device)
    stack.parameter.requires_grad_()
    before = stack.parameter.detach().clone()
    stack.step(0, backend)
    assert stack.parameter.requires_grad and stack.parameter.grad_fn is None
    assert not torch.equal(stack.parameter, before)


def test_opcheck(device):
    for optimizer in ("sgd", "momentum"):
        s = Stack(optimizer, 3, 5, device=device)
        velocity = s.state[0] if optimizer == "momentum" else None
        args = (s.parameter, s.gradients[0], velocity, s.rate, s.decay, s.scale, 0.9)
        torch.library.opcheck(torch.ops.polylib.sweep_sgd_step.default, args)
    s = Stack("adam", 3, 5, device=device)
    args = (s.parameter, s.gradients[0], *s.state, s.rate, None, None, 3, 0.9, 0.99, 1e-8)
    torch.library.opcheck(torch.ops.polylib.sweep_adam_step.default, args)


@OPTIMIZERS
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph(optimizer, backend, device):
    a, b = Stack(optimizer, 3, 5, device=device), Stack(optimizer, 3, 5, device=device)
    function = sweep_adam_step if optimizer == "adam" else sweep_sgd_step
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in range(STEPS):
        a.step(t, backend, compiled)
    for x, y in zip([a.parameter, *a.state], b.run("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.sweep_step").cost
    # 10 x 100 entries and ten rates. Adam: w, g, m, s in; w, m, s out. Momentum: w, g, v in; w, v out. SGD: w, g; w.
    assert cost(10, 100, torch.float32).bytes == 28_000 + 40
    assert cost(10, 100, torch.float32, "momentum").bytes == 20_000 + 40
    assert cost(10, 100, torch.bfloat16, "sgd").bytes == 6_000 + 40
    assert cost(10, 100, torch.float32, "sgd").flops == 2_000
    with pytest.raises(ValueError, match="optimizer"):
        cost(1, 1, torch.float32, "lion")


GOOD = {"parameter": torch.zeros(2, 5), "gradient": torch.zeros(2, 5), "rate": torch.zeros(2)}
STATE = {"first": torch.zeros(2, 5), "second": torch.zeros(2, 5), "step": 1}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"parameter": [1.0]}, TypeError, "parameter must be a torch.Tensor, got list"),
        ({"gradient": torch.zeros(2, 5).double()}, TypeError, "gradient must have the dtype of parameter"),
        ({"gradient": torch.zeros(2, 4)}, ValueError, r"gradient must have shape that of parameter = \(2, 5\)"),
        ({"rate": torch.zeros(3)}, ValueError, r"rate must have shape \(K,\) = \(2,\), got \(3,\)"),
        ({"rate": 0.1}, TypeError, "rate must be a torch.Tensor, got float"),
        ({"decay": torch.zeros(5)}, ValueError, r"decay must have shape \(K,\)"),
        (
            {"scale": torch.zeros(2, device="meta")},
            ValueError,
            "scale must be on the device of parameter, cpu, got meta",
        ),
        ({"velocity": torch.zeros(5, 2)}, ValueError, "velocity must have shape that of parameter"),
        (
            {"parameter": torch.zeros(5, 2).t()},
            ValueError,
            "parameter must be contiguous, since it is changed in place",
        ),
        ({"velocity": torch.zeros(5, 2).t()}, ValueError, "velocity must be contiguous"),
        ({"parameter": torch.zeros(()), "gradient": torch.zeros(())}, ValueError, "got a scalar"),
        ({"momentum": 1.0}, ValueError, "momentum must be from 0 to below 1, got 1.0"),
        ({"momentum": 0.9}, ValueError, "velocity is None; momentum = 0.9 needs a tensor"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments_of_sgd(changed, error, message):
    with pytest.raises(error, match=message):
        sweep_sgd_step(**GOOD | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"first": None}, TypeError, "first must be a torch.Tensor, got NoneType"),
        ({"second": torch.zeros(2)}, ValueError, "second must have shape that of parameter"),
        ({"step": 0}, ValueError, "step must be at least 1, got 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be from 0 to below 1, got 1.0"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be at least 0, got -1.0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be at least 0, got nan"),
    ],
)
def test_bad_arguments_of_adam(changed, error, message):
    with pytest.raises(error, match=message):
        sweep_adam_step(**GOOD | STATE | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.sweep_step").cases(torch.device("cpu"), True):
        after = {}
        for who, (function, tensors) in contestants.items():
            result = function(*tensors)
            after[who] = result[0] if result.dim() > 1 else result
        torch.testing.assert_close(after["reference"], after["ours"])
        assert costs[0].bytes > 0 and costs[1] is None
