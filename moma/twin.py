"""The working copy of a model that multiplies in bf16: its matrices are cast once per optimizer step, not per use.

    master (fp32)  --refresh-->  twin (bf16)  --forward, backward-->  gradient (bf16)  --added to-->  master.grad

Autocast would cast every matrix of every block in every micro-batch, and its gradient back: at 4 + 4 experts that is
eight times a dense model's bytes for the same FLOPs. The numbers are autocast's to the last bit. The twin shares with
its model whatever is not multiplied in bf16 (norms, routers, embeddings) or is cast elsewhere (the loss head), and the
routing state. Optimizer, clipping, checkpoints and evaluation know the masters alone. FSDP2 casts by itself and has no
need of a twin.

Bytes per parameter and micro-batch: 2 read and 8 read and written for the gradient; once per step 4 read, 2 written.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moma.model.precision import wants_full_precision
from moma.model.transformer import Transformer


class Twin(NamedTuple):
    """`model` computes; `low` are its own matrices, and `masters` the parameters that they are copies of."""

    model: Transformer
    low: list[Tensor]
    masters: list[Tensor]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters anew: after every change of them."""
        if self.low:
            torch._foreach_copy_(self.low, self.masters)  # pyright: ignore[reportPrivateImportUsage]


def alone(model: Transformer) -> Twin:
    """The model as its own twin: everything in the type of the masters, or cast by somebody else."""
    return Twin(model, [], [])


def matrices(model: Transformer) -> dict[str, nn.Parameter]:
    """What the blocks multiply in the compute type, by name."""
    named = model.blocks.named_parameters()
    return {name: matrix for name, matrix in named if matrix.ndim > 1 and not wants_full_precision(name)}


def twin_of(model: Transformer, dtype: torch.dtype) -> Twin:
    """A copy of the model whose blocks hold their matrices in `dtype`; their gradients go to the masters' `grad`.

    Build it before the blocks are compiled, and once the masters have their values.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = Twin(copy.deepcopy(model, shared), [], [])
    for name, master in matrices(model).items():
        low = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
        where, _, leaf = name.rpartition(".")
        setattr(twin.model.blocks.get_submodule(where), leaf, low)
        if master.requires_grad:
            low.register_post_accumulate_grad_hook(_handing_over(master))
        twin.low.append(low)
        twin.masters.append(master)
    return twin


def _handing_over(master: nn.Parameter) -> Callable[[Tensor], None]:
    """What a twin's matrix does with its gradient as soon as it is there."""

    def hand_over(low: Tensor) -> None:
        assert low.grad is not None
        if master.grad is None:
            master.grad = low.grad.to(master.grad_dtype or master.dtype)
        else:
            master.grad.add_(low.grad)
        low.grad = None

    return hand_over
