"""EfficientNet-B0, and its scaled relatives.

M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019
(arXiv 1905.11946).
"""

from torch import nn

from polylib.optimization.conv_blocks import Residual, SqueezeExcite, conv_norm
from polylib.optimization.model_scaling import Stages

# Of the bottlenecks that widen: the multiplier is above 1.
EFFICIENTNET_B0 = Stages(
    depths=(1, 2, 2, 3, 3, 4, 1),
    widths=(16, 24, 40, 80, 112, 192, 320),
    resolution=224,
    bottlenecks=(1, 6, 6, 6, 6, 6, 6),
)
_STRIDES, _KERNELS = (1, 2, 2, 2, 1, 2, 1), (3, 3, 5, 3, 5, 5, 3)


def efficientnet(
    stages: Stages = EFFICIENTNET_B0, *, stem: int = 32, head: int = 1280, classes: int = 1000
) -> nn.Sequential:
    """An EfficientNet for images of three channels, without dropout.

    A block is 1 x 1, a depth-wise convolution, squeeze-and-excitation to a quarter of the block's input, 1 x 1.

    Args:
        stages: seven of them; strides and kernels are those of B0.
        stem, head: channels of the first and the last convolution. The scaling multiplies them by the factor of the
            width: `scaled_width`.

    Raises:
        ValueError: not seven stages.
    """
    if not len(stages.depths) == len(stages.widths) == len(stages.bottlenecks) == len(_STRIDES):
        raise ValueError(f"stages must be {len(_STRIDES)}, each with a bottleneck, got {len(stages.depths)}")
    layers: list[nn.Module] = [conv_norm(3, stem, 3, 2, activation=nn.SiLU)]
    w_in = stem
    for depth, width, ratio, stride, kernel in zip(
        stages.depths, stages.widths, stages.bottlenecks, _STRIDES, _KERNELS, strict=True
    ):
        for block in range(depth):
            layers.append(_block(w_in, width, int(w_in * ratio), kernel, stride if block == 0 else 1))
            w_in = width
    layers += [conv_norm(w_in, head, 1, activation=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(head, classes))


def _block(w_in: int, w_out: int, inner: int, kernel: int, stride: int) -> nn.Module:
    widen = [] if inner == w_in else [conv_norm(w_in, inner, 1, activation=nn.SiLU)]
    body = nn.Sequential(
        *widen,
        conv_norm(inner, inner, kernel, stride, inner, nn.SiLU),
        SqueezeExcite(inner, int(w_in * 0.25), nn.SiLU),
        conv_norm(inner, w_out, 1, activation=None),
    )
    return Residual(body) if stride == 1 and w_in == w_out else body
