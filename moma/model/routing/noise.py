"""Gumbel-sigmoid routing noise (MoMa section 2.5): score = sigmoid(x W_g + G' - G''), G', G'' ~ Gumbel(0, 1).

The difference of two independent Gumbel variables is Logistic(0, 1), so one uniform number gives it:

    G' - G''  ~  log u - log(1 - u),   u ~ U(0, 1)

It enters the logits, hence both the choice and the gate. It is a pure function of (seed, micro-batch, layer) on a kind
of device, passed into the model; it exists in pre-training only, never in evaluation, in auxiliary training or in
generation.
"""

import hashlib

import torch
from torch import Tensor


def gumbel_noise(
    seed: int, micro_batch: int, n_layers: int, n_tokens: int, n_experts: int, device: torch.device | str
) -> Tensor:
    """Logistic(0, 1) noise fp32 (n_layers, n_tokens, n_experts) of one micro-batch."""
    digest = hashlib.sha256(f"{seed}/{micro_batch}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    uniform = torch.rand(n_layers, n_tokens, n_experts, generator=generator, device=device)
    return torch.special.logit(uniform, eps=1e-7)
