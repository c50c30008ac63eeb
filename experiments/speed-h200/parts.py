"""What a step is made of, each part in several ways side by side: decides constants of the code, bounds the goals.

    python experiments/speed-h200/parts.py OUT.json [dry=1]

Written after every part, so that a run that was cut still says something. `dry=1`: small shapes, on a CPU too.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moma.benchmarks.ceilings import measure_ceilings
from moma.benchmarks.timing import in_turn, stopwatch
from moma.model import kernels, slots
from moma.model.attention import Attention, AttentionMask, document_mask, flex_mask, rotation

DRY = "dry=1" in sys.argv[2:]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
ROUNDS = 3 if DRY else 11
ROWS = 1 if DRY else 6
TOKENS = 512 if DRY else 24_576
SIZES = {"90m": (512, 8), "435m": (1024, 16), "1_4b": (2048, 16)}  # dim, heads
if DRY:
    SIZES = {"90m": (64, 2)}
plain = slots.plain_gather_sum


def compare(ways: dict[str, Callable[[], Any]], **counts: float) -> dict[str, Any]:
    """Seconds of every way, in turns, and the rates of what `counts` says they do; a way that fails says why."""
    timed, times, failed = stopwatch(DEVICE), {name: [] for name in ways}, {}
    for name, run in list(ways.items()):
        try:
            for _ in range(3):
                run()
        except Exception as error:  # a kernel that this machine or version does not have
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            del times[name]
    for number in range(ROUNDS):
        for name in in_turn(list(times), number):
            times[name].append(timed(ways[name]))
    found: dict[str, Any] = {"failed": failed} if failed else {}
    for name, seconds in times.items():
        found[name] = {"median_us": median(seconds) * 1e6, "min_us": min(seconds) * 1e6}
        found[name] |= {f"{unit}/s": count / median(seconds) for unit, count in counts.items()}
    return found


def normal(*shape: int, grad: bool = False) -> Tensor:
    """Random numbers in bf16."""
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16).requires_grad_(grad)


def both(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Forward and backward; the result has the shape of the first input."""
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(run(*inputs), inputs, grad)


# ---- the parts ------------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, Any]:
    """Matmul and copy, as `moma bench` measures them."""
    return measure_ceilings(DEVICE, torch.bfloat16, side=64 if DRY else None, n_bytes=2**16 if DRY else None)


def expert_matmul() -> dict[str, Any]:
    """The first matrix of eight experts at 1.4B, batched, one matmul for all rows, and one per expert."""
    e, k, d, f = (2, 16, 32, 64) if DRY else (8, 3072, 2048, 10_944)
    x, w = normal(e, k, d), normal(e, d, f)
    return compare(
        {
            "bmm": lambda: torch.bmm(x, w),
            "mm of all rows": lambda: x.view(e * k, d) @ w[0],
            "mm per expert": lambda: [x[i] @ w[i] for i in range(e)],
        },
        flops=2.0 * e * k * d * f,
    )


def selection() -> dict[str, Any]:
    """The best quarter of every expert's tokens."""
    score = torch.randn(8, TOKENS // 2, device=DEVICE)
    k = TOKENS // 8
    return compare(
        {
            "sort, stable": lambda: score.sort(dim=1, descending=True, stable=True),
            "topk, sorted": lambda: score.topk(k, sorted=True),
            "topk": lambda: score.topk(k, sorted=False),
        }
    )


def gather_sums() -> dict[str, Any]:
    """Dispatch and combine: the kernel at several tile sizes, Inductor, plain torch; and with a residual and a norm."""
    # experts that take T / 8 tokens each by chance
    token_EK = torch.stack([torch.randperm(TOKENS, device=DEVICE)[: TOKENS // 8] for _ in range(8)]).sort(dim=1).values
    maps = {"dispatch": token_EK.flatten()[:, None], "combine": slots.slots_of_tokens(token_EK, TOKENS)}
    compiled: Any = torch.compile(plain, dynamic=False)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": plain, "Inductor": compiled}
    default = kernels.TILE, kernels.WARPS

    def kernel(tile: int, warps: int) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, index: Tensor) -> Tensor:
            kernels.TILE, kernels.WARPS = tile, warps
            return kernels.gather_sum_fast(x, index)

        return run

    if CUDA:
        tiles = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
        ways |= {f"kernel, tile {tile}, {warps} warps": kernel(tile, warps) for tile, warps in tiles}

    def alone(x_TD: Tensor, index: Tensor) -> dict[str, Any]:
        rows = len(index) + int((index >= 0).sum())  # written and read
        moved = float(rows * x_TD.shape[1] * 2 + index.numel() * 8)
        wanted = plain(x_TD, index)
        runs: dict[str, Callable[[], Any]] = {name: lambda way=way: way(x_TD, index) for name, way in ways.items()}
        if index.shape[1] == 1:
            runs["index_select"] = lambda: x_TD.index_select(0, index[:, 0])
        found = compare(runs, bytes=moved)
        found["other bits than the plain form"] = [
            name for name, way in ways.items() if not torch.equal(way(x_TD, index), wanted)
        ]
        kernels.TILE, kernels.WARPS = default
        return found

    def within(x_TD: Tensor) -> dict[str, Any]:
        """UNDER_COMPILE: what stands around a combine under `swin`."""
        residual_TD, gain_D = torch.randn(x_TD.shape, device=DEVICE), torch.ones(x_TD.shape[1], device=DEVICE)

        def block(gather: Callable[..., Tensor]) -> Tensor:
            return residual_TD + F.rms_norm(gather(x_TD, maps["combine"]).float(), gain_D.shape, gain_D)

        fused: Any = torch.compile(block, dynamic=False, fullgraph=True)
        runs = {"Inductor alone": lambda: fused(plain)}
        return compare(runs | ({"kernel within": lambda: fused(kernels.gather_sum_fast)} if CUDA else {}))

    found = {}
    for size, (dim, _) in SIZES.items():
        x_TD = normal(TOKENS, dim)
        found |= {f"{what}, {size}": alone(x_TD, index) for what, index in maps.items()}
        found[f"combine, norm, residual, {size}"] = within(x_TD)
    return found


def attention() -> dict[str, Any]:
    """SDPA's kernels for causal rows, forward and backward."""

    def at(dim: int, heads: int) -> dict[str, Any]:
        length = TOKENS // ROWS
        qkv = [normal(ROWS, heads, length, dim // heads, grad=True) for _ in range(3)]

        def by(*backends: SDPBackend) -> Callable[[], Any]:
            def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            return both(causal, *qkv)

        ways = {"default": by()}
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            ways[name] = by(getattr(SDPBackend, name))
        return compare(ways, flops=3.5 * 2 * ROWS * length**2 * dim)  # half of all pairs; backward 2.5 times forward

    return {size: at(*shape) for size, shape in SIZES.items()}


def masks() -> dict[str, Any]:
    """Boolean mask or FlexAttention by length of a row of four documents (FLEX_ROW), and what the masks cost."""
    dim, heads = SIZES["90m"]
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def at(length: int) -> dict[str, Any]:
        rows = TOKENS // length
        document_RL = (torch.arange(length, device=DEVICE) * 4 // length).expand(rows, length).contiguous()
        q, k, v = (normal(rows, heads, length, dim // heads, grad=CUDA) for _ in range(3))
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        keys = (document_RL[:, None, :, None] == document_RL[:, None, None, :]) & causal_LL
        blocks = flex_mask(document_RL)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_RL[row, query] == document_RL[row, key])

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, keys)

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(q, k, v, block_mask=blocks)

        ways: dict[str, Callable[[], Any]] = {"boolean": lambda: dense(q, k, v), "flex": lambda: flex(q, k, v)}
        if CUDA:  # FlexAttention has no backward elsewhere
            ways = {"boolean": both(dense, q, k, v), "flex": both(flex, q, k, v)}
        got, wanted = flex(q, k, v).float(), dense(q, k, v).float()
        return {
            "attention": compare(ways),
            "flex against boolean, relative": ((got - wanted).norm() / wanted.norm()).item(),
            "mask": compare(
                {
                    "document_mask": lambda: document_mask(document_RL),
                    "flex_mask": lambda: flex_mask(document_RL),
                    "create_block_mask": lambda: create_block_mask(sees, rows, None, length, length, DEVICE.type),
                }
            ),
        }

    return {f"{length} keys": at(length) for length in ((128, 256) if DRY else (512, 1024, 2048, 4096))}


def rotations() -> dict[str, Any]:
    """A compiled attention layer, forward and backward, with the rotation made in it or once outside."""

    def at(dim: int, heads: int) -> dict[str, Any]:
        module = Attention(dim, heads, heads, "shared", 10_000.0, 1e-5).to(DEVICE, torch.bfloat16)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=dim**-0.5)
        compiled: Any = torch.compile(module, fullgraph=True, dynamic=False)
        x_RLD = normal(ROWS, TOKENS // ROWS, dim, grad=True)
        position_RL = torch.arange(TOKENS // ROWS, device=DEVICE).expand(ROWS, -1)
        once = rotation(position_RL, dim // heads, 10_000.0, torch.bfloat16)
        mask = AttentionMask(None)
        return compare(
            {
                "in the layer": both(lambda x: compiled(x, position_RL, mask, None), x_RLD),
                "made once": both(lambda x: compiled(x, once, mask, None), x_RLD),
            }
        )

    return {size: at(*shape) for size, shape in SIZES.items()}


def main(out: Path) -> int:
    """All parts, in the order of their use."""
    results: dict[str, Any] = {"torch": torch.__version__, "tokens": TOKENS}
    results["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    for part in (ceilings, gather_sums, attention, masks, expert_matmul, selection, rotations):
        try:
            results[part.__name__] = part()
        except Exception as error:  # the others are still worth having
            results[part.__name__] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(part.__name__, json.dumps(results[part.__name__]), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        torch.compiler.reset()
    return int(any("error" in found for found in results.values() if isinstance(found, dict)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
