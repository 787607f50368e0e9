"""One step of an optimizer for stacked parameters: torch's rules, with settings of its own for each network."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polylib.kernels import sweep_adam_step, sweep_sgd_step
from polylib.lab.stack_settings import Settings


@dataclass
class Block:
    """Parameters that are updated together, side by side: `value`, `(K, entries)`, contiguous."""

    names: list[str]
    widths: list[int]
    value: Tensor
    settings: list[Settings]
    state: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        # Of float32 at least: half precision would round a learning rate to three digits.
        dtype, device = torch.promote_types(self.value.dtype, torch.float32), self.value.device
        self.rate = torch.tensor([own.lr for own in self.settings], dtype=dtype, device=device)
        decays = [own.weight_decay for own in self.settings]
        self.decay = torch.tensor(decays, dtype=dtype, device=device) if any(decays) else None

    def part(self, names: Sequence[str]) -> "Block":
        """Some of the parameters, with their state."""
        where = dict(zip(self.names, self._columns(), strict=True))

        def cut(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:, where[name]] for name in names], 1)

        widths = [where[name].stop - where[name].start for name in names]
        state = {key: cut(value) for key, value in self.state.items()}
        return Block(list(names), widths, cut(self.value), self.settings, state, self.steps)

    def rows(self, rows: Sequence[int]) -> "Block":
        """Some of the networks, with their state."""
        state = {key: value[rows] for key, value in self.state.items()}
        return Block(self.names, self.widths, self.value[rows], [self.settings[k] for k in rows], state, self.steps)

    def views(self, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Each parameter, `(K, ...)`, a view into the block."""
        columns = zip(self.names, self._columns(), strict=True)
        return {name: self.value[:, where].view(len(self.value), *shapes[name]) for name, where in columns}

    def _columns(self) -> Iterator[slice]:
        start = 0
        for width in self.widths:
            yield slice(start, start + width)
            start += width


Optimizer = Callable[[Block, Tensor, float | Tensor, Tensor | None], None]


def sgd(block: Block, gradient: Tensor, factor: float | Tensor, scale: Tensor | None) -> None:
    """`torch.optim.SGD`; `factor` multiplies the rates, and `scale`, `(K,)`, the gradient."""
    if not block.state and any(own.momentum for own in block.settings):
        block.state["velocity"] = torch.zeros_like(block.value)

    def take(part: Block, own: Settings, gradient: Tensor, rate: Tensor, scale: Tensor | None) -> None:
        velocity = part.state.get("velocity")
        sweep_sgd_step(
            part.value, gradient, rate, velocity=velocity, momentum=own.momentum, decay=part.decay, scale=scale
        )

    _by_setting(block, lambda own: own.momentum, take, gradient, factor, scale)


def adamw(block: Block, gradient: Tensor, factor: float | Tensor, scale: Tensor | None) -> None:
    """`torch.optim.AdamW`: the weights decay apart from the gradient."""
    if not block.state:
        block.state = {"first": torch.zeros_like(block.value), "second": torch.zeros_like(block.value)}
    block.steps += 1

    def take(part: Block, own: Settings, gradient: Tensor, rate: Tensor, scale: Tensor | None) -> None:
        sweep_adam_step(
            part.value,
            gradient,
            part.state["first"],
            part.state["second"],
            rate,
            step=block.steps,
            betas=own.betas,
            epsilon=own.eps,
            decay=part.decay,
            scale=scale,
        )

    _by_setting(block, lambda own: (own.betas, own.eps), take, gradient, factor, scale)


def adam(block: Block, gradient: Tensor, factor: float | Tensor, scale: Tensor | None) -> None:
    """`torch.optim.Adam`: the decay is a part of the gradient."""
    if block.decay is None:
        return adamw(block, gradient, factor, scale)
    wide = gradient if scale is None else gradient * scale[:, None]
    decay, block.decay = block.decay, None
    try:
        adamw(block, wide + (decay[:, None] * block.value).to(gradient.dtype), factor, None)
    finally:
        block.decay = decay


def _by_setting(
    block: Block,
    key: Callable[[Settings], object],
    take: Callable[..., None],
    gradient: Tensor,
    factor: float | Tensor,
    scale: Tensor | None,
) -> None:
    """Take the step at once if the networks agree on what the kernels have one number for, else by groups of them."""
    rate = block.rate * factor
    alike: dict[object, list[int]] = {}
    for k, own in enumerate(block.settings):
        alike.setdefault(key(own), []).append(k)
    if len(alike) == 1:
        return take(block, block.settings[0], gradient, rate, scale)
    for rows in alike.values():
        part = block.rows(rows)
        if block.decay is None:
            part.decay = None
        take(part, part.settings[0], gradient[rows], rate[rows], None if scale is None else scale[rows])
        block.value[rows] = part.value
        for name, state in part.state.items():
            block.state[name][rows] = state


OPTIMIZERS: dict[str, Optimizer] = {"sgd": sgd, "adam": adam, "adamw": adamw}
