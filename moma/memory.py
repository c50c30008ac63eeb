"""Memory of one training step before anything is allocated: an estimate in bytes, one device, eager.

    parameters, gradients   4 B each          optimizer       AdamW, 8 B          (all parameters trained)
                            stored in bf16: gradients 2 B, moments 4 B, but for norms and routers
    working_copy            2 B for each number of the blocks' matrices (bf16, not shared out: moma/twin.py)
    activations             what autograd keeps of the blocks, one of each kind measured without memory
    loss_head               hidden states, chunk of logits, gradient of the head, all at once
    peak                    what stays + max(loss head + activations, one block's backward + gradients)

`parts` processes that share out the matrices (FSDP2) hold a part of each, and one block whole at a time. Recomputed
blocks keep their input (`full`), and the results of matmuls (`selective`). Compiled blocks keep less.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moma.distributed import KEPT
from moma.modality import TokenGroups, Vocabulary
from moma.model.attention import AttentionMask, Rotation, document_mask, rotation
from moma.model.block import Block
from moma.model.loss import CACHE_BYTES, tokens_per_chunk
from moma.model.precision import wants_full_precision
from moma.model.transformer import Architecture, Transformer
from moma.twin import twin_of

Recompute = Literal["none", "selective", "full"]
Stored = Literal["fp32", "bf16"]
RESIDENT = ("parameters", "working_copy", "optimizer")


def step_memory(
    model: Transformer,
    vocab: Vocabulary,
    rows: int,
    row_length: int,
    images: int,
    precision: str,
    recompute: Recompute = "none",
    parts: int = 1,
    state_dtype: Stored = "fp32",
    grad_dtype: Stored = "fp32",
) -> dict[str, int]:
    """Bytes of one training step on one device by kind, and their peak; all of `model` (on the meta device) trained.

    `state_dtype`, `grad_dtype`: of AdamW's moments and of the gradients, as in `moma.optim.OptimConfig`.
    """
    copied = sum(p.numel() for name, p in model.named_parameters() if wants_full_precision(name))
    params = copied + -(-(sum(p.numel() for p in model.parameters()) - copied) // parts)
    tokens, dim, size = rows * row_length, model.config.dim, model.vocab_size
    low = 2 if precision == "bf16" else 4
    aux = any(".aux." in name for name, _ in model.named_parameters())
    blocks = block_activations(model.architecture, aux, vocab, rows, row_length, images, precision, recompute)
    chunk = min(tokens_per_chunk(size, torch.bfloat16 if precision == "bf16" else torch.float32), tokens)
    casts = low * size * dim + low * tokens * dim if precision == "bf16" else 0
    # a chunk of logits, and fp32 rows of it; both gradients, and a chunk's part of the head's; cast weight and states
    head = chunk * size * low + 2 * CACHE_BYTES + 4 * (size * dim + tokens * dim) + low * size * dim + casts
    matrices = sum(
        p.numel() for name, p in model.blocks.named_parameters() if p.ndim > 1 and not wants_full_precision(name)
    )
    stem = 4 * tokens * dim * 2  # embedding output, final norm
    saved = 2 * (params - copied)  # by what is stored in bf16
    bytes_ = {
        "parameters": 4 * params,
        "gradients": 4 * params - (saved if grad_dtype == "bf16" else 0),
        "optimizer": 8 * params - (2 * saved if state_dtype == "bf16" else 0),
        "working_copy": 2 * matrices if precision == "bf16" and parts == 1 else 0,
        "activations": sum(kept for kept, _ in blocks) + stem,
        "loss_head": head,
    }
    whole = 0  # embedding and head, and one block, put together
    if parts > 1:
        largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        whole = 4 * 2 * size * dim + 2 * low * largest
    forward = bytes_["activations"] + head
    backward = bytes_["gradients"] + max(kept + more for kept, more in blocks)
    return bytes_ | {"peak": sum(bytes_[kind] for kind in RESIDENT) + whole + max(forward, backward)}


def block_activations(
    architecture: Architecture,
    aux_routers: bool,
    vocab: Vocabulary,
    rows: int,
    row_length: int,
    images: int,
    precision: str,
    recompute: Recompute = "none",
) -> list[tuple[int, int]]:
    """Per block, bytes kept of one micro-batch from forward to backward, and further ones during its backward."""
    found: dict[Any, tuple[int, int]] = {}
    with FakeTensorMode():  # meta tensors that say "cpu", so that autocast applies
        model = Transformer(architecture, 1, vocab.modalities, aux_routers)
        if precision == "bf16":
            model = twin_of(model, torch.bfloat16).model
        x_RLD = torch.empty(rows, row_length, architecture.model.dim, requires_grad=True)
        position_RL = torch.empty(rows, row_length, dtype=torch.int64)
        config = architecture.model
        turn = rotation(position_RL, config.dim // config.n_heads, config.rope_theta, torch.float32)
        mask = document_mask(position_RL)
        groups = _groups(rows * row_length, images, vocab)
        blocks = [(_kind(block), block) for block in cast(Iterable[Block], model.blocks)]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for kind, block in blocks:
                if kind not in found:
                    found[kind] = _kept(block, x_RLD, turn, mask, groups, recompute)
    return [found[kind] for kind, _ in blocks]


def _kind(block: Block) -> Any:
    """What two blocks have in common if they keep the same."""
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())


class _Results(TorchDispatchMode):
    """Adds up the bytes of what the operations of `KEPT` return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            self.bytes += sum(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def _kept(
    block: Block,
    x_RLD: Tensor,
    turn: Rotation,
    mask: AttentionMask,
    groups: TokenGroups,
    recompute: Recompute,
) -> tuple[int, int]:
    """Bytes kept of one block beside its parameters until its backward, and the largest tensor, or what is computed
    again, that comes on top then."""
    assert mask.document_RL is not None
    given = (*turn, mask.document_RL, *groups.index, *groups.slot, *block.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with _Results() as results, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_RLD, turn, mask, groups, "train")
    every, largest = sum(kept.values()), max(kept.values(), default=0)
    if recompute == "none":
        return every, largest
    held = x_RLD.untyped_storage().nbytes() + (results.bytes if recompute == "selective" else 0)
    return held, max(0, every - held) + largest


def _groups(tokens: int, images: int, vocab: Vocabulary) -> TokenGroups:
    """Index sets of the right sizes without contents."""
    image = images * vocab.tokens_per_image
    counts = (tokens - image, image, *([0] * len(vocab.extra_modalities)))
    empty = lambda n: torch.empty(n, dtype=torch.int64)  # noqa: E731
    return TokenGroups(tuple(empty(n) for n in counts), tuple(empty(tokens) for _ in counts))
