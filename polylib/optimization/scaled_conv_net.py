"""A small residual network whose stages are given, and published networks scaled by a strategy."""

from torch import Tensor, nn

from polylib import _checks
from polylib.optimization.conv_blocks import Residual, conv_norm, projection
from polylib.optimization.efficientnets import EFFICIENTNET_B0, efficientnet
from polylib.optimization.model_scaling import Stages, scale_stages, scaled_width, scaling_factors
from polylib.optimization.regnets import regnet, regnet_y


class ScaledConvNet(nn.Module):
    """A network of stages of basic residual blocks, without a stem: all of it is scaled, depth, width and resolution.

    Each block is two 3 x 3 convolutions with batch norm beside a shortcut; the first of a stage halves the resolution.

    Args:
        stages: group widths and bottlenecks are not used.
        in_channels, classes: of the images, and how many outputs.
        residual: False leaves the shortcuts out, which makes a plain network.

    Raises:
        ValueError: widths and depths that don't go together, or are not positive integers.
    """

    def __init__(self, stages: Stages, *, in_channels: int = 3, classes: int = 10, residual: bool = True) -> None:
        super().__init__()
        if len(stages.depths) != len(stages.widths) or not stages.depths:
            raise ValueError(f"widths must have one entry for each of {len(stages.depths)} depths, at least one")
        blocks: list[nn.Module] = []
        w_in = in_channels
        for depth, width in zip(stages.depths, stages.widths, strict=True):
            for block in range(_checks.integer("depths", depth, least=1)):
                stride = 2 if block == 0 else 1
                last = None if residual else nn.ReLU
                body = nn.Sequential(conv_norm(w_in, width, 3, stride), conv_norm(width, width, 3, activation=last))
                blocks.append(Residual(body, projection(w_in, width, stride), nn.ReLU) if residual else body)
                w_in = width
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(w_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, in_channels, H, W)`."""
        return self.classifier(self.features(x).mean((2, 3)))


def scaled_network(name: str, strategy: str, s: float, resolution: int = 224) -> tuple[nn.Sequential, int]:
    """A published network scaled to s times its flops, and the side of its images.

    Args:
        name: `"RegNetY-400MF"`, `"RegNetY-4.0GF"` or `"EfficientNet-B0"`.
        strategy, s: as in `scaling_factors`.
        resolution: of the network before it is scaled.

    Raises:
        ValueError: another name, or a bad strategy, factor or resolution.
    """
    if name != "EfficientNet-B0":
        stages = scale_stages(regnet_y(name)._replace(resolution=resolution), strategy, s)
        return regnet(stages), stages.resolution
    stages = scale_stages(EFFICIENTNET_B0._replace(resolution=resolution), strategy, s)
    factor = scaling_factors(strategy, s).width
    return efficientnet(stages, stem=scaled_width(32, factor), head=scaled_width(1280, factor)), stages.resolution
