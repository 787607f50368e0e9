"""Every public module of polylib in the world that users have: saved, copied, moved, compiled, exported, trained in
parallel. The modules are collected, so that a new one is asked for an example here."""

import copy
import importlib
import inspect
import io
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import nn

import polylib
from polylib import neurons, optimization, quantization, regimes, sequences, sparsity
from polylib.lab import Stack, transformer


def collected() -> dict[str, type[nn.Module]]:
    """All classes of modules whose names have no underscore, by name."""
    found = {}
    for info in pkgutil.walk_packages(polylib.__path__, "polylib."):
        if info.name.rpartition(".")[2].startswith("_"):
            continue
        for name, kind in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == info.name
            if own and not name.startswith("_"):
                found[name] = kind
    return found


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def pruned() -> nn.Module:
    layer = neurons.SelectableKANLinear(6, 3)
    layer.mask[:, 1:] = 0
    layer.mask[0, 1] = 1
    return importlib.import_module("polylib.neurons.selectable_kan").PrunedKANLinear(layer)


class Convolved(nn.Module):
    """Kernels as a module of one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences.S4DKernel(3, 8, disc="bilinear", train_B=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sequences.causal_convolution(x, self.inner(x.shape[-1]))


class Filtered(nn.Module):
    """Computed kernels as a module of one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences.ImplicitFilter(3, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sequences.causal_convolution(x, self.inner(x.shape[-1]))


class Predicted(nn.Module):
    """A hypernetwork as a module of one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = regimes.MIPHyperNet({"gamma": (3,)}, {"a.weight": (4, 2), "a.bias": (4,)}, [5])

    def forward(self, gamma: torch.Tensor) -> torch.Tensor:
        return torch.cat([value.flatten(1) for value in self.inner(gamma=gamma).values()], 1)


class Routed(nn.Module):
    """Gates and the balance loss as a module of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sparsity.HiddenDimensionRouter(16, 8, 4, 1)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        gate, balance = self.inner(u)
        return gate + balance


class Attended(nn.Module):
    """A power-law graph attention without its caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences.PowerLawGraphAttention(8, 2, 1, 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class Inferred(nn.Module):
    """The bilinear form of some queries."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences.MetricLearner(2, 4, 1, 2, 5)
        nn.init.constant_(self.inner.b, 3.0)  # away from 0, where the power's slope is too steep to compare runs

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return self.inner(q).G_LM


class BlockAlone(nn.Module):
    """A block of a PLDR decoder without its caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences.PLDRBlock(8, 2, 1, 1, 5, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape) - 0.5


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape)


# For each module how one is made, and inputs whose first axis is a batch.
EXAMPLES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "ActivationQuantizer": (lambda: quantization.ActivationQuantizer(4, 6), lambda n: torch.randn(n, 5, 6)),
    "Attention": (lambda: transformer.Attention(8, 2, causal=True), lambda n: torch.randn(n, 5, 8)),
    "BiPerConv1d": (lambda: quantization.BiPerConv1d(3, 4, 3, 20.0, padding=1), lambda n: torch.randn(n, 3, 9)),
    "BiPerConv2d": (lambda: quantization.BiPerConv2d(3, 4, 3, 20.0, stage=2), lambda n: torch.randn(n, 3, 6, 7)),
    "BiPerLinear": (lambda: quantization.BiPerLinear(8, 6, 20.0), lambda n: torch.randn(n, 8)),
    "BlockDiagonalGLU": (lambda: sequences.BlockDiagonalGLU(8, 2), lambda n: torch.randn(n, 5, 8)),
    "BlockDiagonalLinear": (lambda: sequences.BlockDiagonalLinear(7, 6, 3), lambda n: torch.randn(n, 7)),
    "BinaryQuantizer": (quantization.BinaryQuantizer, lambda n: torch.randn(n, 6)),
    "Block": (
        lambda: transformer.Block(8, transformer.Attention(8, 2, False), feed_forward(), nn.LayerNorm),
        lambda n: torch.randn(n, 5, 8),
    ),
    "CombinerSelfAttention": (lambda: sequences.CombinerSelfAttention(8, 2), lambda n: torch.randn(n, 7, 8)),
    "Decoder": (lambda: transformer.Decoder(11, 7, feed_forward, width=8, heads=2), lambda n: tokens(n, 7)),
    "DeltaActivation": (
        lambda: sparsity.DeltaActivation(4, 1, threshold=0.02, bias=True),
        lambda n: torch.randn(n, 3, 4, 5),
    ),
    "EvoNorm2d": (lambda: neurons.EvoNorm2d(4, groups=2), lambda n: torch.randn(n, 4, 5, 6)),
    "FixedPoint": (lambda: quantization.FixedPoint(4, 2.0), lambda n: torch.randn(n, 6)),
    "FixedPointQuantizer": (lambda: quantization.FixedPointQuantizer(4), lambda n: torch.randn(n, 6)),
    "FixedPointResidualBlock": (lambda: quantization.FixedPointResidualBlock(8, 6, k=2), lambda n: torch.randn(n, 8)),
    "FrameNetwork": (
        lambda: sparsity.FrameNetwork(sparsity.DeltaActivation(8, threshold=0.02), nn.Linear(8, 6)),
        lambda n: torch.randn(n, 3, 8),
    ),
    "GRKANLinear": (lambda: neurons.GRKANLinear(8, 6, groups=2), lambda n: torch.randn(n, 8)),
    "GPTLayer": (lambda: sequences.GPTLayer(8, 2), lambda n: torch.randn(n, 7, 8)),
    "GaussianMoE": (lambda: sparsity.GaussianMoE(4, 3, activation="tanh"), lambda n: torch.randn(n, 4)),
    "GraphNormAct": (
        lambda: neurons.GraphNormAct(4, next(iter(neurons.KNOWN_LAYERS.values())), groups=2),
        lambda n: torch.randn(n, 4, 5, 6),
    ),
    "GroupRational": (lambda: neurons.GroupRational(8, groups=2), lambda n: torch.randn(n, 8)),
    "GroupFusion": (lambda: sparsity.GroupFusion(12, 3), lambda n: torch.randn(n, 5, 12)),
    "HiddenDimensionRouter": (Routed, lambda n: torch.randn(n, 5, 16)),
    "ImplicitFilter": (Filtered, lambda n: 0.1 * torch.randn(n, 3, 7)),
    "KernelizedSelfAttention": (
        lambda: sequences.KernelizedSelfAttention(8, 2, 7, causal=True),
        lambda n: torch.randn(n, 5, 8),
    ),
    "LSQQuantizer": (lambda: quantization.LSQQuantizer(4, axis=-1), lambda n: torch.randn(n, 6)),
    "LinearizedModel": (lambda: regimes.LinearizedModel(nn.Linear(8, 6)), lambda n: torch.randn(n, 8)),
    "LongConvolution": (lambda: sequences.LongConvolution(4, 7, causal=False), lambda n: torch.randn(n, 7, 4)),
    "MIPHyperNet": (Predicted, lambda n: torch.rand(n, 3)),
    "MetricLearner": (Inferred, lambda n: torch.randn(n, 2, 7, 4)),
    "MoHDSublayer": (
        lambda: sparsity.MoHDSublayer(nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16)), 16, 8, 4, 2),
        lambda n: torch.randn(n, 5, 16),
    ),
    "MonarchLinear": (lambda: sequences.MonarchLinear(8, 6, 2), lambda n: torch.randn(n, 8)),
    "MonarchMixer": (lambda: sequences.MonarchMixer(4, 7, causal=True), lambda n: torch.randn(n, 7, 4)),
    "PHConv1d": (lambda: neurons.PHConv1d(4, 6, 3, n=2), lambda n: torch.randn(n, 4, 9)),
    "PHConv2d": (lambda: neurons.PHConv2d(4, 6, 3, n=2), lambda n: torch.randn(n, 4, 7, 6)),
    "PHConv3d": (lambda: neurons.PHConv3d(4, 6, 2, n=2), lambda n: torch.randn(n, 4, 3, 4, 5)),
    "PHMLinear": (lambda: neurons.PHMLinear(8, 6, 2), lambda n: torch.randn(n, 8)),
    "PLDRBlock": (BlockAlone, lambda n: torch.randn(n, 5, 8)),
    "PLDRDecoder": (lambda: sequences.PLDRDecoder(11, 8, 2, 2, 1, 1, 5), lambda n: tokens(n, 7)),
    "PackedBinary": (
        lambda: quantization.PackedBinary(quantization.BiPerConv2d(3, 4, 3, 20.0, stage=2, padding=1)),
        lambda n: torch.randn(n, 3, 6, 7),
    ),
    "PolyNorm": (neurons.PolyNorm, lambda n: torch.randn(n, 8)),
    "PolyReLU": (neurons.PolyReLU, lambda n: torch.randn(n, 8)),
    "PolynomialTwoLayer": (lambda: regimes.PolynomialTwoLayer(8, 6, 1.0, 0.5), lambda n: torch.randn(n, 8)),
    "PowerLawGraphAttention": (Attended, lambda n: torch.randn(n, 5, 8)),
    "PrunedKANLinear": (pruned, lambda n: uniform(n, 6)),
    "QKNormAttention": (lambda: optimization.QKNormAttention(8, 2), lambda n: torch.randn(n, 5, 8)),
    "QKReparamAttention": (lambda: quantization.QKReparamAttention(8, 2, 4), lambda n: torch.randn(n, 5, 8)),
    "QuadraticConv2d": (lambda: neurons.QuadraticConv2d(3, 4, 3), lambda n: torch.randn(n, 3, 6, 7)),
    "QuadraticLinear": (lambda: neurons.QuadraticLinear(8, 6), lambda n: torch.randn(n, 8)),
    "QuantizedAttention": (lambda: quantization.QuantizedAttention(8, 2, 4), lambda n: torch.randn(n, 5, 8)),
    "ReluRNN": (lambda: regimes.ReluRNN(3, 8, 2), lambda n: torch.randn(n, 5, 3)),
    "Residual": (lambda: optimization.Residual(nn.Linear(8, 8), None, nn.ReLU), lambda n: torch.randn(n, 8)),
    "S4D": (lambda: sequences.S4D(4, d_state=8), lambda n: torch.randn(n, 7, 4)),
    "S4DKernel": (Convolved, lambda n: torch.randn(n, 3, 7)),
    "ScaledConvNet": (
        lambda: optimization.ScaledConvNet(optimization.Stages((1, 2), (8, 16), 8), classes=3),
        lambda n: torch.randn(n, 3, 8, 8),
    ),
    "SelectableKANLinear": (lambda: neurons.SelectableKANLinear(6, 3), lambda n: uniform(n, 6)),
    "ShortConvolution": (lambda: sequences.ShortConvolution(4), lambda n: torch.randn(n, 7, 4)),
    "SignalTransformer": (
        lambda: transformer.SignalTransformer(20, 3, feed_forward, width=8, heads=2),
        lambda n: torch.randn(n, 20),
    ),
    "SparseActivation": (
        lambda: nn.Sequential(nn.Linear(4, 6), sparsity.SparseActivation()),
        lambda n: torch.randn(n, 3, 4),
    ),
    "SqueezeExcite": (lambda: optimization.SqueezeExcite(6, 2), lambda n: torch.randn(n, 6, 4, 5)),
    "SparseSelfAttention": (
        lambda: sequences.SparseSelfAttention(8, 2, "fixed", 3),
        lambda n: torch.randn(n, 7, 8),
    ),
    "SparseOTRouter": (lambda: sparsity.SparseOTRouter(3, iters=4), lambda n: torch.randn(n, 6, 3)),
    "StatsQuantizer": (lambda: quantization.StatsQuantizer(4), lambda n: torch.randn(n, 6)),
    "ThreeLayerResidualNet": (lambda: neurons.ThreeLayerResidualNet(4, 5, 9), lambda n: torch.randn(n, 4)),
    "SwiGLU": (lambda: sequences.SwiGLU(8, 16, 6), lambda n: torch.randn(n, 8)),
    "TokenwiseOffload": (
        lambda: sequences.TokenwiseOffload(sequences.GPTLayer(8, 2), 0.5),
        lambda n: torch.randn(n, 7, 8),
    ),
    "TopK": (lambda: nn.Sequential(nn.Linear(8, 6), sparsity.TopK(4)), lambda n: torch.randn(n, 5, 8)),
    "TopKMLP": (lambda: sparsity.TopKMLP(8, 16, 12), lambda n: torch.randn(n, 5, 8)),
    "UniformQuantizer": (lambda: quantization.UniformQuantizer(4), lambda n: torch.randn(n, 6)),
}
NO_EXAMPLE = {"StackedCall": "calls functions of models, not tensors; tests/lab/test_stack.py has it"}
NAMES = sorted(EXAMPLES)

NOT_HERE = {
    **{
        (name, "empty"): "a weight without entries has no step: refused by name"
        for name in ("BinaryQuantizer", "FixedPointQuantizer", "StatsQuantizer", "UniformQuantizer")
    },
    ("LinearizedModel", "export"): "torch.export fixes the sizes of what torch.func.jvp differentiates",
    ("ScaledConvNet", "empty"): "torch's batch norm counts an empty batch as a batch",
    ("SparseOTRouter", "empty"): "it has no parameters to go backward to; tests/sparsity/test_routing.py has it",
    (
        "TokenwiseOffload",
        "compile",
    ): "hooks break the graph; tests/sequences/test_token_offload.py has it",
    ("TokenwiseOffload", "stack"): "under torch.vmap tensors have no storage that could be swapped",
    ("PrunedKANLinear", "meta"): "which parameters it has depends on the values of the layer that was pruned",
}


def skip_if_listed(name: str, check: str) -> None:
    if reason := NOT_HERE.get((name, check)):
        pytest.skip(reason)


def made(name: str, seen: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """A module and an input of four samples; with `seen` the module has had one before."""
    torch.manual_seed(0)
    make, inputs = EXAMPLES[name]
    module = make()
    x = inputs(4)
    if seen:
        with torch.no_grad():
            module(x)
    return module, x


def same(module: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(module.eval()(x), other.eval()(x))


def floating(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def slope(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of all that is trained, by a loss that none of them leaves out."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    return [p.grad for p in (*module.parameters(), x) if p.grad is not None]


def test_every_module_has_an_example():
    assert set(collected()) == set(EXAMPLES) | set(NO_EXAMPLE)
    assert {name for name, _ in NOT_HERE} <= set(EXAMPLES)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_copied_pickled_and_loaded(name, seen):
    module, x = made(name, seen)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    state, saved = io.BytesIO(), module.state_dict()
    torch.save(saved, state)
    state.seek(0)
    loaded = made(name, seen=False)[0]
    for value in loaded.state_dict().values():
        if value.is_floating_point():
            value.zero_()
    loaded.load_state_dict(torch.load(state))
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), loaded):
        same(copy.deepcopy(module), other, x)
    assert sum(p.numel() for p in module.parameters()) >= 0
    module.share_memory()


@pytest.mark.parametrize("name", NAMES)
def test_made_without_memory_and_filled(name):
    skip_if_listed(name, "meta")
    real, x = made(name)
    with torch.device("meta"):
        empty = EXAMPLES[name][0]()
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(real.state_dict())
    same(real, filled, x)
    if x.is_floating_point():
        assert copy.deepcopy(real).to("meta")(x.to("meta")).shape == real(x).shape


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_by_default_and_by_a_cast(name):
    torch.set_default_dtype(torch.float64)
    try:
        module, x = made(name)
        y = module(x)
        assert y.dtype == torch.float64
        assert all(t.dtype == torch.float64 for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
        assert all(gradient.dtype == torch.float64 for gradient in slope(module, x))
    finally:
        torch.set_default_dtype(torch.float32)
    module, x = made(name)
    narrow = module.eval()(x)
    wide = module.double()(floating(x, torch.float64))
    assert wide.dtype == torch.float64
    if not any(word in name for word in ("Quant", "QKReparam", "Fixed")):  # a rounding may fall to the other side
        torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    module, x = made(name)
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        gradients = slope(module, x)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    distance = (y.float() - plain).square().mean() / plain.square().mean().clamp(min=1e-6)
    assert distance < (0.3 if "Attention" in name else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_in_inference_mode_and_then_trained(name):
    module, x = made(name, seen=False)
    with torch.inference_mode():
        inside = module.eval()(x.clone())
    torch.testing.assert_close(module(x), inside)
    assert all(g.isfinite().all() for g in slope(module.train(), x))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    skip_if_listed(name, "empty")
    module, x = made(name)
    state = copy.deepcopy(module.state_dict())
    y = module(x[:0])
    assert y.shape == (0, *module(x).shape[1:])
    module.load_state_dict(state)
    module(x[:0]).sum().backward()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_count(name):
    module, x = made(name)
    expected = slope(copy.deepcopy(module), x)
    other = x.transpose(0, -1).contiguous().transpose(0, -1)
    apart = torch.stack([x, x], -1)[..., 0]
    for view in (other, apart):
        assert not view.is_contiguous()
        torch.testing.assert_close(slope(copy.deepcopy(module), view), expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph(name):
    skip_if_listed(name, "compile")
    module, x = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(slope(copy.deepcopy(module), x), slope(compiled, x))


@pytest.mark.parametrize("name", NAMES)
def test_exported_with_any_number_of_samples(name):
    skip_if_listed(name, "export")
    module, x = made(name)
    module.eval()
    shapes = ({0: torch.export.Dim("samples", min=1, max=4096)},)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False).module()
        for count in (1, 4, 50):
            other = EXAMPLES[name][1](count)
            torch.testing.assert_close(exported(other), module(other))


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_in_backward(name):
    module, x = made(name)
    other = copy.deepcopy(module)

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = other

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.testing.assert_close(slope(Recomputed(), x), slope(module, x))


@pytest.mark.parametrize("name", NAMES)
def test_two_in_a_stack_train_as_alone(name):
    skip_if_listed(name, "stack")
    module, x = made(name)
    if not any(p.requires_grad for p in module.parameters()):
        pytest.skip("nothing to train")

    def loss(module, x):
        y = module(x)
        return y.square().mean() + 0.1 * y.sum()

    alone = [module, copy.deepcopy(module)]
    together = Stack(copy.deepcopy(alone), [0.01, 0.02])
    values = torch.stack([together.step(loss, x, shared=True) for _ in range(2)], 1)
    together.write_back()
    for k, rate in enumerate((0.01, 0.02)):
        optimizer = torch.optim.SGD([p for p in alone[k].parameters() if p.requires_grad], rate)
        for step in range(2):
            value = loss(alone[k], x)
            torch.testing.assert_close(values[k, step], value.detach(), rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        torch.testing.assert_close(together.models[k].state_dict(), alone[k].state_dict(), rtol=1e-4, atol=1e-5)


class Losses(nn.Module):
    """All modules as one, so that one exchange of gradients serves them all."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleDict(modules)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(module(inputs[name]).square().mean() for name, module in self.each.items())


def train_in_parallel(rank: int, file: str) -> None:
    """Two processes, half a batch each: their gradients are the mean of both."""
    torch.set_num_threads(1)
    store = f"file://{file}"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    examples = {name: made(name) for name in NAMES}
    whole = Losses({name: module for name, (module, _) in examples.items()}).eval()  # no statistics of half a batch
    halves = [{name: x[2 * k : 2 * k + 2] for name, (_, x) in examples.items()} for k in range(2)]
    expected: dict[str, torch.Tensor] = {}
    for half in halves:
        other = copy.deepcopy(whole)
        other(half).backward()
        for key, parameter in other.named_parameters():
            if parameter.grad is not None:
                expected[key] = expected.get(key, 0) + parameter.grad / 2
    parallel = nn.parallel.DistributedDataParallel(whole, find_unused_parameters=True)
    parallel(halves[rank]).backward()
    assert len(expected) > 2 * len(NAMES)
    for key, parameter in whole.named_parameters():
        if key in expected:
            torch.testing.assert_close(
                parameter.grad, expected[key], msg=lambda text, key=key: f"{key}: {text}", rtol=1e-4, atol=1e-5
            )
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_in_two_processes(tmp_path):
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "store")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None
    workers = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "".join(said)[-3000:]


if __name__ == "__main__":
    train_in_parallel(int(sys.argv[2]), sys.argv[1])
