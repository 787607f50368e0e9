"""Any network, with its first-order expansion in the parameters in place of itself."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

Params = dict[str, Tensor]


class LinearizedModel(nn.Module):
    """The lazy twin of a network: f(theta0) + J(theta0) (theta - theta0), which is linear in its parameters theta.

    Trained as the network is, it is what the network would be if its features, the columns of J, never moved. J is
    never formed: a forward pass is one Jacobian-vector product. Its parameters are those of the network under the
    prefix `moving`; the frozen expansion point is `start`. Both are copies.

    Args:
        module: the network. Its parameters, as they stand, are the first theta. Samples are seen as it sees them:
            put layers that draw random numbers or use the statistics of the batch into evaluation mode.
        params0: theta0, by name; by default the parameters of the module as they stand.

    Raises:
        ValueError: `params0` has other names or shapes than the parameters of the module.
    """

    def __init__(self, module: nn.Module, params0: Params | None = None) -> None:
        super().__init__()
        self.moving = copy.deepcopy(module)
        self.start = copy.deepcopy(module).requires_grad_(False)
        if params0 is not None:
            _load(self.start, params0)

    def forward(self, x: Tensor) -> Tensor:
        """What the module returns for `x`, to first order around theta0."""
        start = dict(self.start.named_parameters())
        step = {name: value - start[name] for name, value in self.moving.named_parameters()}
        output, change = jvp(lambda params: functional_call(self.start, params, (x,)), (start,), (step,))
        return output + change


@torch.no_grad()
def _load(module: nn.Module, params: Params) -> None:
    own = dict(module.named_parameters())
    if set(params) != set(own):
        raise ValueError(f"params0 must have the names {sorted(own)}, got {sorted(params)}")
    for name, value in params.items():
        if value.shape != own[name].shape:
            given = tuple(value.shape)
            raise ValueError(f"params0[{name!r}] must have shape {tuple(own[name].shape)}, got {given}")
    for name, value in params.items():
        own[name].copy_(value)
