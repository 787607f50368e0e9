"""Hypernetworks whose predictions don't scale with their input: a code of constant length, and changes to own weights.

After Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning" (2024),
and their package `hyperlight` 0.0.5, whose initial values are kept. A hypernetwork predicts, from a few numbers, all
weights of a primary network, which `torch.func.functional_call` then applies.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from polylib import _checks

ENCODINGS = ("cos_sin", "complement", "sphere")
# The gains are those of nn.init; the smooth activations take that of LeakyReLU, as in `hyperlight`.
ACTIVATIONS = {"LeakyReLU": "leaky_relu", "ReLU": "relu", "Tanh": "tanh", "GELU": "leaky_relu", "SiLU": "leaky_relu"}
_SMALLEST_NORM = 1e-6


def encode_constant_norm(z: Tensor, mode: str = "cos_sin", *, strict: bool = False) -> Tensor:
    """Codes of (nearly) one length, whatever the size of the input.

    - `"cos_sin"`: all cosines of pi z / 2, then all sines. The Euclidean norm is sqrt(D).
    - `"complement"`: z, then 1 - z. The sum of the entries is D; the Euclidean norm varies by a factor of sqrt(2).
    - `"sphere"`: z, brought to the norm sqrt(D), for inputs without bounds. The magnitude is lost: with D = 1 all but
      the sign.

    Args:
        z: `(..., D)`, floating point. For the first two modes its entries are meant to lie between 0 and 1: outside,
            different inputs get the same code.
        strict: raise, where the default is to warn, for entries outside. Under `torch.func` transforms and
            `torch.compile` values are not looked at.

    Returns:
        `(..., 2 D)`, or `(..., D)` for `"sphere"`.

    Raises:
        ValueError: an unknown mode, D = 0, entries that are not finite, or with `strict` entries outside 0 to 1.
        TypeError: a tensor that is not of floating point.
    """
    _checks.choice("mode", mode, ENCODINGS)
    if not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor, got {z.dtype}")
    _checks.shape("z", z, "(..., D) with D of at least 1", z.dim() >= 1 and z.shape[-1] >= 1)
    if not (z.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        _check_values(z.detach(), mode, strict)
    if mode == "cos_sin":
        angle = math.pi / 2 * z
        return torch.cat([angle.cos(), angle.sin()], -1)
    if mode == "complement":
        return torch.cat([z, 1 - z], -1)
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return math.sqrt(z.shape[-1]) * z / norm.clamp(min=_SMALLEST_NORM)


class MIPHyperNet(nn.Module):
    """Predicts the named weights of a primary network: theta = theta0 + h(E(inputs)).

    E is an encoding of constant norm, h a perceptron, and theta0 the weights that a network without a hypernetwork
    would have. theta0 is the bias of the last layer of h, and is trained with it. `encoding="none", residual=False`
    gives the ordinary hypernetwork, in which that bias starts at zero.

    Args:
        input_shapes: of each input by name. The inputs are flattened and put side by side in the order of their names,
            then encoded together.
        output_shapes: of each predicted tensor by name, as in a module's `named_parameters`.
        hidden_sizes: widths of the hidden layers of h, one at least.
        encoding: of the inputs, as in `encode_constant_norm`, or `"none"`.
        residual: theta0 starts as an ordinary network does: Kaiming normal for weights, 1 for weights of one dimension
            (those of normalisation layers), 0 for all else.
        activation: `"LeakyReLU"`, `"ReLU"`, `"Tanh"`, `"GELU"` or `"SiLU"`.
        layer_norm: put a `LayerNorm` before each activation, with a scale and a shift.

    The weights of h are Kaiming normal by fan-out, since the last layer is much wider than the others. Its rows are
    drawn separately for each predicted tensor, with the number of entries of that tensor as its fan-out; the rows of
    tensors that are named bias are zero. All biases but theta0 are zero.

    Raises:
        ValueError: no inputs, outputs or hidden layers, sizes that are not positive, an unknown encoding or activation.
    """

    def __init__(
        self,
        input_shapes: Mapping[str, Sequence[int]],
        output_shapes: Mapping[str, Sequence[int]],
        hidden_sizes: Sequence[int],
        *,
        encoding: str = "cos_sin",
        residual: bool = True,
        activation: str = "LeakyReLU",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoding = _checks.choice("encoding", encoding, (*ENCODINGS, "none"))
        kind: Any = ACTIVATIONS[_checks.choice("activation", activation, ACTIVATIONS)]
        gain = nn.init.calculate_gain(kind)
        self.input_shapes = _shapes("input_shapes", input_shapes)
        self.output_shapes = _shapes("output_shapes", output_shapes)
        if not hidden_sizes:
            raise ValueError("hidden_sizes must be at least one width, got none")
        width = sum(map(math.prod, self.input_shapes.values())) * (2 if encoding in ("cos_sin", "complement") else 1)
        layers: list[nn.Module] = []
        for size in (_checks.integer("hidden_sizes", size, least=1) for size in hidden_sizes):
            hidden = nn.Linear(width, size)
            nn.init.normal_(hidden.weight, std=gain / math.sqrt(size))
            nn.init.zeros_(hidden.bias)
            layers += [hidden, *([nn.LayerNorm(size)] if layer_norm else []), getattr(nn, activation)()]
            width = size
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width, sum(map(math.prod, self.output_shapes.values())))
        self._start_output(gain, residual)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        input_shapes: Mapping[str, Sequence[int]],
        hidden_sizes: Sequence[int],
        names: Iterable[str] | None = None,
        **options: object,
    ) -> Self:
        """A hypernetwork for the parameters of a module, all or those of the given names, with its weights as theta0.

        Raises:
            ValueError: a name that is none of the module's parameters, or what the class itself refuses; theta0 is the
                module's, so `residual=False` is refused too.
        """
        if not options.get("residual", True):
            raise ValueError("residual must be True with the weights of a module, got False")
        own = dict(module.named_parameters())
        chosen = list(own) if names is None else list(names)
        for name in chosen:
            _checks.choice("names", name, own)
        shapes = {name: own[name].shape for name in chosen}
        made = cls(input_shapes, shapes, hidden_sizes, **options)  # type: ignore[arg-type]
        made.set_base_weights({name: own[name].detach() for name in chosen})
        return made

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The weights by name, each `(B, *shape)`, or `(*shape)` if the inputs have no batch dimension.

        Raises:
            ValueError: missing or unexpected inputs, shapes that don't fit, or batches of different sizes.
        """
        flat = self.output(self.hidden(self.code(**inputs)))
        return self._split(flat)

    def code(self, **inputs: Tensor) -> Tensor:
        """What the perceptron sees of the inputs: `(B, entries)` or `(entries,)`. Raises as `forward` does."""
        _same_names("inputs", self.input_shapes, inputs)
        leading = []
        for name, shape in self.input_shapes.items():
            value, extra = inputs[name], inputs[name].dim() - len(shape)
            fits = extra in (0, 1) and tuple(value.shape[extra:]) == shape
            _checks.shape(name, value, f"{shape} or {('B', *shape)}", fits)
            leading.append(tuple(value.shape[:extra]))
        batch = leading[0]
        if any(own != batch for own in leading[1:]):
            sizes = {name: tuple(value.shape) for name, value in inputs.items()}
            raise ValueError(f"inputs must have one batch size, got {sizes}")
        shapes = sorted(self.input_shapes.items())
        flat = torch.cat([inputs[name].reshape(*batch, math.prod(shape)) for name, shape in shapes], -1)
        return flat if self.encoding == "none" else encode_constant_norm(flat, self.encoding)

    def base_weights(self) -> dict[str, Tensor]:
        """theta0 by name, a copy."""
        return {name: value.clone() for name, value in self._split(self.output.bias.detach()).items()}

    @torch.no_grad()
    def set_base_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy values into theta0, such as those of a trained network.

        Raises:
            ValueError: missing or unexpected names, or shapes that are not those of `output_shapes`.
        """
        _same_names("weights", self.output_shapes, weights)
        for name, shape in self.output_shapes.items():
            _checks.shape(name, weights[name], f"{shape}", tuple(weights[name].shape) == shape)
        self.output.bias.copy_(torch.cat([weights[name].reshape(-1) for name in self.output_shapes]))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [math.prod(shape) for shape in self.output_shapes.values()]
        parts = zip(self.output_shapes.items(), flat.split(sizes, -1), strict=True)
        return {name: part.reshape(*flat.shape[:-1], *shape) for (name, shape), part in parts}

    @torch.no_grad()
    def _start_output(self, gain: float, residual: bool) -> None:
        nn.init.zeros_(self.output.bias)
        sizes = [math.prod(shape) for shape in self.output_shapes.values()]
        blocks = zip(self.output_shapes.items(), self.output.weight.split(sizes), strict=True)
        base = self._split(self.output.bias)  # views
        for (name, shape), block in blocks:
            kind = name.rpartition(".")[2]
            if kind == "bias":
                block.zero_()
            else:
                block.normal_(std=gain / math.sqrt(len(block)))
            if residual and kind == "weight":
                if len(shape) > 1:
                    nn.init.kaiming_normal_(base[name], a=0.01, nonlinearity="leaky_relu")
                else:
                    base[name].fill_(1.0)


def _check_values(z: Tensor, mode: str, strict: bool) -> None:
    if not z.isfinite().all():
        raise ValueError("z must be finite, got inf or nan")
    if mode == "sphere" or z.numel() == 0:
        return
    low, high = z.min().item(), z.max().item()
    if low < 0 or high > 1:
        words = f"z must lie between 0 and 1 for the mode {mode!r}, got {low:g} to {high:g}"
        if strict:
            raise ValueError(words)
        warnings.warn(words, stacklevel=3)


def _shapes(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    if not shapes:
        raise ValueError(f"{name} must be at least one shape by its name, got none")
    return {key: tuple(_checks.integer(f"{name}[{key!r}]", size, least=1) for size in shapes[key]) for key in shapes}


def _same_names(what: str, expected: Mapping[str, object], given: Mapping[str, object]) -> None:
    if expected.keys() != given.keys():
        raise ValueError(f"{what} must be {', '.join(expected)}, got {', '.join(given) or 'none'}")
