"""Routing noise: what is drawn for the routers of a micro-batch, before the model runs.

Gumbel-sigmoid (MoMa section 2.5): score = sigmoid(x W_g + G' - G''), G', G'' ~ Gumbel(0, 1). The difference of two
independent Gumbel variables is Logistic(0, 1), so one uniform number gives it:

    G' - G''  ~  log u - log(1 - u),   u ~ U(0, 1)

It enters the logits, hence both the choice and the gate, in pre-training only, never in evaluation, in auxiliary
training or in generation. Rules that draw (the sampled second choice of token choice) get Gumbel(0, 1) instead.

All of it is a pure function of (seed, micro-batch, layer) on a kind of device, passed into the model.
"""

import torch
from torch import Tensor

from moma.seeds import generator


def gumbel_sigmoid_noise(key: str, n_tokens: int, n_experts: int, device: torch.device | str) -> Tensor:
    """Logistic(0, 1) noise fp32 (n_tokens, n_experts), a function of `key`."""
    return torch.special.logit(_uniform(key, n_tokens, n_experts, device), eps=1e-7)


def gumbel_noise(key: str, n_tokens: int, n_experts: int, device: torch.device | str) -> Tensor:
    """Gumbel(0, 1) noise fp32 (n_tokens, n_experts), a function of `key`."""
    return -torch.log(-torch.log(_uniform(key, n_tokens, n_experts, device).clamp(1e-7, 1 - 1e-7)))


def _uniform(key: str, n_tokens: int, n_experts: int, device: torch.device | str) -> Tensor:
    return torch.rand(n_tokens, n_experts, generator=generator(key, device), device=device)
