"""Losses of the image tokenizer: pixels (L1), perceptual features, and a patch discriminator with hinge loss.

    reconstruction = |x^ - x|_1 + w_p sum_l mean |f_l(x^)/s_l - f_l(x)/s_l|^2
    total          = reconstruction + w_q quantiser + lambda w_d (-mean D(x^))
    lambda         = |grad_last reconstruction| / (|grad_last (-mean D(x^))| + delta)     (arXiv 2012.09841, eq. 7)

f_l are the block outputs of an EfficientNet-Lite0 trained on ImageNet (`lite0.py`), s_l(x) the root mean square of
f_l(x) over channels and positions, so that all blocks count alike.
delta = 1e-4 and lambda at most 1e4, as in the published code; the paper writes 1e-6.
The gradients are taken at the picture first and sent through the decoder once: see `picture_gradient`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.vqgan.lite0 import Lite0

FEATURE_BLOCKS = (0, 2, 4, 7, 10)  # the last block of each resolution down to 1/16, and one more at 1/16


class PerceptualLoss(nn.Module):
    """Distance of EfficientNet-Lite0 features; the weights are frozen and taken from the installed package.

    Batch norm is folded into the convolutions. ValueError if the package is missing.
    """

    def __init__(self):
        super().__init__()
        self.network = Lite0(FEATURE_BLOCKS[-1] + 1)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps (n, c_l, h_l, w_l) of FEATURE_BLOCKS for pictures `x` (n, 3, s, s) in [-1, 1]."""
        return [h for i, h in enumerate(self.network(x)) if i in FEATURE_BLOCKS]

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
    average_: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> PictureGradient:
    """Gradient at `x_hat` of the losses against `x`, both (n, 3, s, s).

    Everything behind the picture (feature network, discriminator) is passed once, the decoder not at all but
    for its last weight, `last_layer`, where lambda compares the two. `discriminator=None`: no such term.
    `average_` replaces tensors by their means over the ranks, so that lambda is that of the whole batch.
    """
    leaf = x_hat.detach().float().requires_grad_()
    l1 = (leaf - x).abs().mean()
    features = perceptual(leaf, x) if perceptual is not None else leaf.new_zeros(())
    (gradient,) = torch.autograd.grad(l1 + perceptual_weight * features, leaf)
    adversarial, adaptive = leaf.new_zeros(()), leaf.new_zeros(())
    if discriminator is not None:
        adversarial = -discriminator(leaf).float().mean()
        (toward_real,) = torch.autograd.grad(adversarial, leaf)
        at_last = [
            torch.autograd.grad(x_hat, last_layer, g.to(x_hat.dtype), retain_graph=True)[0].float()
            for g in (gradient, toward_real)
        ]
        average_(at_last)
        adaptive = (at_last[0].norm() / (at_last[1].norm() + 1e-4)).clamp(0, 1e4)
        gradient = gradient + discriminator_weight * adaptive * toward_real
    return PictureGradient(gradient, l1.detach(), features.detach(), adversarial.detach(), adaptive)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss of its scores on real and on reconstructed pictures (any shapes); scalar."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
