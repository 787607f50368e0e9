"""Parts of convolutional networks: convolution with batch norm, squeeze-and-excitation, and a residual block."""

from torch import Tensor, nn


def conv_norm(
    w_in: int, w_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """A convolution without bias, its batch norm and its activation, if any. The kernel is odd, the padding zeros."""
    conv = nn.Conv2d(w_in, w_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(w_out), *([activation()] if activation else []))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that a small network computes from the means of all channels.

    J. Hu, L. Shen and G. Sun, "Squeeze-and-Excitation Networks", CVPR 2018 (arXiv 1709.01507).

    Args:
        width: channels of the map, `(N, width, H, W)`.
        squeezed: channels in the middle.
        activation: between the two layers.
    """

    def __init__(self, width: int, squeezed: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            activation(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Residual(nn.Module):
    """The sum of a body and a shortcut, and an activation of it.

    Args:
        body: what is learned.
        shortcut: what is added; by default the input as it is.
        activation: of the sum; by default none.
    """

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, activation: type[nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.body(x))


def projection(w_in: int, w_out: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: the input, or where the shape changes a 1 x 1 convolution with batch norm."""
    if w_in == w_out and stride == 1:
        return nn.Identity()
    return conv_norm(w_in, w_out, 1, stride, activation=None)
