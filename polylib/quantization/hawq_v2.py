"""How many bits a layer needs: the trace of its Hessian, and the sensitivity to rounding that it gives.

At a minimum of the loss a small change d of the n weights of a layer costs about d^T H d / 2, where H is the layer's
block of the Hessian. For a d that favours no eigenvector this is ``|d|^2`` Tr(H) / (2 n). HAWQ-V2 sums
``|Q(W) - W|^2`` Tr(H) / n over the layers, Omega, and looks for the bits that make it small (`select_bits`).

Source: Dong and others, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020. The
estimator of the trace: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from polylib import _checks
from polylib.quantization.quantizers import UniformQuantizer


class HutchinsonTrace(NamedTuple):
    """Estimates of traces and their standard errors, `(L,)` each; with a single probe the errors are nan."""

    trace: Tensor
    stderr: Tensor


@torch.no_grad()
def hutchinson_trace(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    num_probes: int = 50,
    *,
    per_block: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> HutchinsonTrace:
    """For each tensor of `params` the trace of its diagonal block of the Hessian of `loss_fn`, by random probes.

    A probe z has entries of +1 and -1; z_i^T (H z)_i has the trace of block i as its mean. One product H z, the
    derivative of the gradient, serves all blocks. Off the diagonal it adds noise, which `per_block` takes away as far
    as it comes from other blocks, for L times the products: z is then zero outside the block. The gradient is computed
    once and is differentiated for `chunk_size` probes at a time by `vmap`. No `.grad` is touched.

    Layers that draw random numbers or use the statistics of the batch must be in evaluation mode, or there is no fixed
    Hessian. `loss_fn` must be twice differentiable by reverse mode; the kink of a ReLU counts as straight.

    Args:
        loss_fn: maps a dict like `params` to a scalar.
        params: where the Hessian is taken: L floating-point tensors of any shape.
        generator: draws the probes; by default the global one.
        chunk_size: how many probes are in memory at once, all by default. Ten are often faster on a processor.

    Raises:
        ValueError: `num_probes` or `chunk_size` below 1, no params or some that are not floating point, or a loss that
            is not a scalar.
    """
    for name, value in (("num_probes", num_probes), ("chunk_size", 1 if chunk_size is None else chunk_size)):
        _checks.integer(name, value, least=1)
    params = {name: value.detach() for name, value in params.items()}
    if not params or not all(value.is_floating_point() for value in params.values()):
        given = {name: value.dtype for name, value in params.items()}
        raise ValueError(f"params must be at least one tensor, all of floating point, got {given}")

    def blocks(own: dict[str, Tensor]) -> Tensor:
        """Of every probe and tensor z_i^T (H z)_i, `(num_probes, len(own))`."""
        products = vjp(grad(lambda values: _scalar(loss_fn(params | values))), own)[1]
        probes = {name: _signs(num_probes, value, generator) for name, value in own.items()}

        def one(z: dict[str, Tensor]) -> Tensor:
            (change,) = products(z)
            return torch.stack([(z[name] * change[name]).sum() for name in z])

        return vmap(one, chunk_size=chunk_size)(probes)

    parts = [{name: value} for name, value in params.items()] if per_block else [params]
    samples = torch.cat([blocks(own) for own in parts], 1)
    spread = samples.var(0, correction=0) / torch.tensor(num_probes - 1)
    return HutchinsonTrace(samples.mean(0), spread.sqrt())


def activation_trace(
    model: nn.Module,
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    layers: Sequence[str],
    num_probes: int = 50,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> HutchinsonTrace:
    """The trace of the Hessian of a sample's loss by the output of a layer, averaged over samples, for L layers.

    The outputs are shifted by variables at zero, and the Hessian is that by the shifts. Without coupling in the batch
    it is block-diagonal over the samples, so the trace for the mean loss is the mean of the samples' traces.

    Args:
        model: in evaluation mode; each named layer is called once in a forward pass and returns one tensor.
        loss_fn: maps the outputs of `model` to the *mean* loss of the samples, a scalar.
        x: a batch of inputs.
        layers: names in `model.named_modules()`.
        num_probes, generator, chunk_size: as in `hutchinson_trace`, which also says what else is raised.

    Raises:
        ValueError: no layers, or a name that is not a module of `model` or that a forward pass does not call.
    """
    modules = dict(model.named_modules())
    if not layers or not set(layers) <= set(modules):
        raise ValueError(f"layers must be some of the modules {', '.join(filter(None, modules))}, got {list(layers)}")

    seen: dict[str, Tensor] = {}

    def loss_of(shifts: Mapping[str, Tensor]) -> Tensor:
        def shift(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            name = names[module]
            seen[name] = output.detach()
            return output + shifts[name] if name in shifts else output

        names = {modules[name]: name for name in layers}
        hooks = [module.register_forward_hook(shift) for module in names]
        try:
            return loss_fn(model(x))
        finally:
            for hook in hooks:
                hook.remove()

    with torch.no_grad():
        loss_of({})  # for the shapes
    if len(seen) < len(set(layers)):
        raise ValueError(f"layers names {sorted(set(layers) - set(seen))}, which a forward pass does not call")
    zeros = {name: torch.zeros_like(seen[name]) for name in layers}
    return hutchinson_trace(loss_of, zeros, num_probes, generator=generator, chunk_size=chunk_size)


def quantization_sensitivity(
    weights: Mapping[str, Tensor] | Sequence[Tensor],
    average_traces: Tensor | Sequence[float],
    bits: Sequence[int],
    quantizer: Callable[[int], nn.Module] = UniformQuantizer,
) -> tuple[Tensor, Tensor]:
    """What each number of bits costs each layer: Omega = average trace times ``|Q(W) - W|^2``.

    Args:
        weights: L tensors, of any shape.
        average_traces: `(L,)`, the trace of each block of the Hessian divided by the number of its weights. Negative
            ones, a sign that training has not converged, count as zero, with a `UserWarning`.
        bits: the B numbers of bits to try.
        quantizer: makes a quantiser from a number of bits.

    Returns:
        Omega and the squared distances ``|Q(W) - W|^2``, both `(L, B)`, float64.

    Raises:
        ValueError: no weights, another number of traces, or traces that are not finite.
    """
    tensors = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    traces = torch.as_tensor(average_traces, dtype=torch.float64).detach().cpu()
    if not tensors or traces.shape != (len(tensors),) or not traces.isfinite().all():
        raise ValueError(f"average_traces must be {len(tensors)} finite numbers, one a weight, got {traces.tolist()}")
    if (traces < 0).any():
        warnings.warn("average_traces has negative entries, which count as zero: train further", stacklevel=2)
    with torch.no_grad():
        rows = [[(quantizer(b)(w) - w).double().square().sum().cpu() for b in bits] for w in tensors]
    perturbation = torch.stack([torch.stack(row) for row in rows])
    return traces.clamp(min=0)[:, None] * perturbation, perturbation


def _signs(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rademacher probes for one tensor, `(count, *like.shape)`."""
    source = like.device if generator is None else generator.device
    coins = torch.randint(2, (count, *like.shape), generator=generator, device=source)
    return (2 * coins - 1).to(like)


def _scalar(loss: Tensor) -> Tensor:
    if loss.dim():
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    return loss
