"""Suite `attention`: one attention layer, forward and backward, over packed documents and over one per row.

    x (R, L, D) -> wqkv -> RoPE -> [ what is compared ] -> wo,   gradients of x and of the weights

Every case has the same projections and no QK-norm; only what happens between them differs. FLOPs are those that the
mask needs: 3 x (projections + 4 H A per pair of a query and a key it sees). Memory: the peak of a repetition.
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moma.benchmarks.config import DTYPES, BenchConfig, compiles
from moma.benchmarks.memory import peak_extra_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.timing import Absent, Bench, Case, Goal
from moma.distributed import autocast, choose_precision, fast_float32
from moma.model.attention import Attention, dense_mask, document_mask, rotate, rotation

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (R, H, L, A), k and v (R, G, L, A) -> (R, H, L, A)
MASKED, CAUSAL, OURS = "SDPA, boolean mask", "SDPA causal", "ours"


def run(config: BenchConfig, device: torch.device) -> Bench:
    """Ours and torch's own kernels; those for GPUs are absent elsewhere."""
    precision = choose_precision(config.precision, device)
    dtype, model = DTYPES[precision], config.model
    side, n_images = images_of(config.rows, config.row_length, config.image_share)
    batches = {
        where: micro_batch(
            vocabulary(config.vocab_size, side), config.rows, config.row_length, n_images, documents, config.seed
        ).to(device)
        for where, documents in (("packed", config.documents), ("one document", 1))
    }
    position_RL, groups = batches["packed"].position_RL, batches["packed"].groups
    heads = (model.n_heads, model.kv_heads, model.kv_heads)
    head_dim = model.dim // model.n_heads
    source = torch.Generator().manual_seed(config.seed)
    shape = (config.rows, config.row_length, model.dim)
    x_RLD = torch.randn(shape, generator=source).to(device).requires_grad_()
    grad_RLD = torch.randn(shape, generator=source).to(device, dtype)
    compiled = compiles(config, device)

    def layer() -> Attention:
        made = Attention(model.dim, model.n_heads, model.kv_heads, "none", model.rope_theta, 1e-5)
        weights = torch.Generator().manual_seed(config.seed)  # the same in all cases
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * parameter.shape[-1] ** -0.5)
        return made.to(device, dtype)

    def case(name: str, where: str, between: Kernel | None, ours: bool = False, note: str = "") -> Case:
        made = layer()
        mask = document_mask(batches[where].document_RL, batches[where].alone) if between is None else None

        def forward(x_RLD: Tensor) -> Tensor:
            if between is None:
                return made(x_RLD, position_RL, mask, groups)
            qkv_RLJA = made.wqkv(x_RLD).unflatten(2, (sum(heads), head_dim))
            q_RHLA, k_RGLA, v_RGLA = qkv_RLJA.transpose(1, 2).split(heads, dim=1)
            turn = rotation(position_RL, head_dim, model.rope_theta, q_RHLA.dtype)
            y_RHLA = between(*(rotate(x, turn).to(x.dtype) for x in (q_RHLA, k_RGLA)), v_RGLA)
            return made.wo(y_RHLA.transpose(1, 2).flatten(2))

        runs: Any = torch.compile(forward, dynamic=False) if compiled else forward
        inputs = [x_RLD, *made.parameters()]

        def step() -> Any:
            with autocast(precision, device):
                y_RLD = runs(x_RLD)
            return torch.autograd.grad(y_RLD, inputs, grad_RLD.to(y_RLD.dtype))

        weights = sum(p.numel() for p in made.parameters())
        document_RL = batches[where].document_RL
        flops = 3 * (2.0 * config.tokens * weights + 4.0 * model.dim * pairs(document_RL))
        return Case(
            f"{name}, {where}",
            step,
            ours,
            flops=flops,
            tokens=config.tokens,
            note=note,
            memory=lambda: peak_extra_bytes(step, device),
            within=partial(fast_float32, device),
        )

    def plain(mask: Tensor | None, backend: SDPBackend | None = None) -> Kernel:
        def between(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                return F.scaled_dot_product_attention(
                    q_RHLA, k_RGLA, v_RGLA, mask, is_causal=mask is None, enable_gqa=heads[0] != heads[1]
                )

        return between

    packed_RL = batches["packed"].document_RL
    keys = dense_mask(packed_RL)
    cases = [
        case(MASKED, "packed", plain(keys), ours=True),
        case(OURS, "packed", None, ours=True),
        case(OURS, "one document", None, ours=True),
        case(CAUSAL, "one document", plain(None)),
        case("SDPA causal, one by one", "packed", one_by_one(packed_RL), note="a shape of its own for every batch"),
        Case("our mask, built", lambda: document_mask(packed_RL), note="once per micro-batch, for all layers"),
    ]
    absent: list[Absent] = []
    if device.type == "cuda":
        cases += [
            case("SDPA cuDNN causal", "one document", plain(None, SDPBackend.CUDNN_ATTENTION)),
            case("SDPA flash causal", "one document", plain(None, SDPBackend.FLASH_ATTENTION)),
            case("SDPA cuDNN, boolean mask", "packed", plain(keys, SDPBackend.CUDNN_ATTENTION)),
            case("flex", "packed", flex(packed_RL, heads[0] != heads[1])),
            case("varlen", "packed", varlen(packed_RL)),
        ]
    else:
        names = ("SDPA cuDNN causal, one document", "SDPA flash causal, one document",
                 "SDPA cuDNN, boolean mask, packed", "flex, packed", "varlen, packed")  # fmt: skip
        absent = [Absent(name, "forward and backward run on a GPU alone") for name in names]
    facts = {
        "rows": config.rows,
        "row_length": config.row_length,
        "documents": config.documents,
        "heads": heads[0],
        "key_value_heads": heads[1],
        "head_dim": head_dim,
        "pairs": {where: pairs(batch.document_RL) for where, batch in batches.items()},
        "compiled": compiled,
    }
    twin = case(f"{MASKED} again", "packed", plain(keys), ours=True)
    return Bench(cases, f"{MASKED}, packed", twin, absent, facts, goals(device, model.n_layers))


def pairs(document_RL: Tensor) -> int:
    """Pairs of a query and a key that it sees, of all rows; documents are runs of equal numbers."""
    total = 0
    for row in document_RL.cpu():
        lengths = torch.unique_consecutive(row, return_counts=True)[1]
        total += int((lengths * (lengths + 1) // 2).sum())
    return total


def one_by_one(document_RL: Tensor) -> Kernel:
    """SDPA's causal kernel once per document: no pair is computed that the mask forbids, and the host knows lengths."""
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_RL.cpu()]

    def between(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor) -> Tensor:
        grouped, rows = q_RHLA.shape[1] != k_RGLA.shape[1], []
        for row, own in enumerate(lengths):
            parts = zip(*(x[row : row + 1].split(own, dim=2) for x in (q_RHLA, k_RGLA, v_RGLA)), strict=True)
            rows.append(
                torch.cat(
                    [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=grouped) for part in parts], 2
                )
            )
        return torch.cat(rows)

    return between


def flex(document_RL: Tensor, grouped: bool) -> Kernel:
    """FlexAttention under a mask of documents."""
    rows, length = document_RL.shape

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_RL[row, query] == document_RL[row, key])

    mask = create_block_mask(same_document, rows, None, length, length, document_RL.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q_RHLA, k_RGLA, v_RGLA: compiled(q_RHLA, k_RGLA, v_RGLA, block_mask=mask, enable_gqa=grouped)


def varlen(document_RL: Tensor) -> Kernel:
    """torch's attention over documents of any length, one after the other; as many key heads as query heads."""
    lengths = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in document_RL.cpu()])
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(document_RL.device, torch.int32)
    longest = int(lengths.max())
    from torch.nn.attention.varlen import varlen_attn  # loads the flash kernels

    window = "window_size" in inspect.signature(varlen_attn).parameters  # the older way to say it: is_causal
    causal: dict[str, Any] = {"window_size": (-1, 0)} if window else {"is_causal": True}

    def between(q_RHLA: Tensor, k_RGLA: Tensor, v_RGLA: Tensor) -> Tensor:
        q_THA, k_THA, v_THA = (x.transpose(1, 2).flatten(0, 1) for x in (q_RHLA, k_RGLA, v_RGLA))
        y_THA: Any = varlen_attn(q_THA, k_THA, v_THA, ends, ends, longest, longest, **causal)
        return y_THA.unflatten(0, (len(document_RL), -1)).transpose(1, 2)

    return between


def goals(device: torch.device, n_layers: int) -> list[Goal]:
    """What this suite is held to."""
    if device.type != "cuda":
        return []
    one, packed = f"{OURS}, one document", f"{OURS}, packed"
    return [
        Goal("H9", "time of SDPA causal / time of ours, one document", 1.5, one, f"{CAUSAL}, one document",
             at_least=True),
        Goal("H9", "time of SDPA, boolean mask / time of ours, packed", 1.3, packed, at_least=True),
        Goal("H9", "time of our mask, built / time of ours, packed, in all layers", 0.01 * n_layers, "our mask, built",
             packed),
    ]  # fmt: skip
