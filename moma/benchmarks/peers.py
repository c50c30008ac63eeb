"""Other systems' layers and loss heads, each built at the shapes of ours. One door per library, opened on use.

    layers    mixture-of-experts feed-forwards, (T, D) -> (T, D), `experts` SwiGLU experts of full width
    heads     linear layer + cross-entropy, (hidden (T, D), weight (V, D), target (T,)) -> mean loss over targets

Token choice with top-1 routing does the dense layer's FLOPs, as expert choice does: every token runs through one
expert of full width. Their gates are a random projection of random inputs, so that experts get almost equal loads.
A library that is not installed is absent, with its reason; nothing is downloaded.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.benchmarks.timing import Absent, first_line
from moma.modality import IGNORE

Z_WEIGHT = 1e-5  # of the loss heads that have a z-loss, as in training
GATHERED_LIMIT = 2**33  # bytes of expert weights copied per token, beyond which `batched_mm` is left out


class LayerShape(NamedTuple):
    """What a peer's layer is built for; T = rows x row_length."""

    dim: int
    hidden_dim: int
    experts: int
    rows: int
    row_length: int
    dtype: torch.dtype
    device: torch.device

    @property
    def top_1_flops(self) -> float:
        """Forward FLOPs per token of one SwiGLU expert and a router."""
        return 6.0 * self.dim * self.hidden_dim + 2.0 * self.dim * self.experts


class PeerLayer(NamedTuple):
    """`forward` (T, D) -> (T, D); `flops_per_token` of the forward (None: as counted); `graphs`: whether it can be
    compiled."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    flops_per_token: float | None
    graphs: bool
    note: str = ""


class PeerHead(NamedTuple):
    """`loss(hidden_TD, weight_VD, target_T)`: the mean over targets, z-loss included where `z_loss`."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    z_loss: bool
    note: str = ""


class Entry(NamedTuple):
    """How to build a peer, and how to get it where it cannot be imported."""

    build: Callable[..., Any]
    get: str


def built(name: str, entry: Entry, *inputs: Any) -> Any:
    """What `entry.build(*inputs)` makes, or why it is `Absent`."""
    try:
        return entry.build(*inputs)
    except ImportError as error:
        return Absent(name, f"{first_line(error)} ({entry.get})")
    except Exception as error:
        return Absent(name, first_line(error))


def use_sources(folder: Path | None) -> None:
    """Let peers be imported from a folder that the user names; what is installed goes first."""
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def _drawn(module: nn.Module, shape: LayerShape) -> nn.Module:
    """The module on its device, in its dtype; matrices normal with deviation dim^-1/2, vectors as they are."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=shape.dim**-0.5)
    return module.to(device=shape.device, dtype=shape.dtype)


def _transformers(family: str, implementation: str) -> Callable[[LayerShape], PeerLayer]:
    def build(shape: LayerShape) -> PeerLayer:
        size = torch.finfo(shape.dtype).bits // 8
        gathered = 3 * shape.dim * shape.hidden_dim * size * shape.rows * shape.row_length
        if implementation == "batched_mm" and gathered > GATHERED_LIMIT:
            raise ValueError(f"copies its experts' weights for every token, {gathered / 2**30:,.0f} GiB here")
        width: dict[str, Any] = {"hidden_size": shape.dim, "num_experts_per_tok": 1}
        if family == "Mixtral":
            from transformers.models.mixtral.configuration_mixtral import MixtralConfig as config
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as block

            width |= {"intermediate_size": shape.hidden_dim, "num_local_experts": shape.experts}
        elif family == "OLMoE":
            from transformers.models.olmoe.configuration_olmoe import OlmoeConfig as config
            from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as block

            width |= {"intermediate_size": shape.hidden_dim, "num_experts": shape.experts}
        else:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig as config
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as block

            width |= {"moe_intermediate_size": shape.hidden_dim, "num_experts": shape.experts}
        made: Any = config(**width)
        made._experts_implementation = implementation
        module = _drawn(block(made), shape)

        def forward(x_TD: Tensor) -> Tensor:
            return module(x_TD[None])[0]

        eager = implementation == "eager"  # its loop over the experts depends on the data
        note = "top-1 of 8" + (", not compiled" if eager else "")
        return PeerLayer(module, forward, shape.top_1_flops, not eager, note)

    return build


def _torchtitan(shape: LayerShape) -> PeerLayer:
    from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.moe import (  # pyright: ignore[reportMissingImports]
        GroupedExperts,
        MoE,
        RoutedExperts,
        TokenChoiceTopKRouter,
    )
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # pyright: ignore[reportMissingImports]

    if shape.dtype != torch.bfloat16:
        raise ValueError("multiplies in bf16 whatever its weights are: compare precision=bf16")
    experts = GroupedExperts.Config(dim=shape.dim, hidden_dim=shape.hidden_dim, num_experts=shape.experts)
    dispatcher = LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=1)
    router = TokenChoiceTopKRouter.Config(
        num_experts=shape.experts,
        gate=Linear.Config(in_features=shape.dim, out_features=shape.experts),
        top_k=1,
        _debug_force_load_balance=True,
    )
    module = _drawn(
        MoE.Config(
            num_experts=shape.experts,
            routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
            router=router,
        ).build(),
        shape,
    )

    def forward(x_TD: Tensor) -> Tensor:
        return module(x_TD.view(shape.rows, shape.row_length, shape.dim)).flatten(0, 1)

    return PeerLayer(module, forward, shape.top_1_flops, True, "top-1 of 8, balance forced")


class _GroupedLayer(nn.Module):
    """Token choice the way torchtitan 0.3 describes it, in any dtype: sort the tokens by their expert, three grouped
    matmuls with separate weights (E, out, in), weigh in fp32, scatter-add."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        size = (shape.experts, shape.hidden_dim, shape.dim)
        self.gate = nn.Linear(shape.dim, shape.experts, bias=False)
        self.w1, self.w3 = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.w2 = nn.Parameter(torch.empty(size[0], size[2], size[1]))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        score_TE = torch.sigmoid(self.gate(x_TD).float())
        score_T, expert_T = score_TE.max(1)
        order_S = expert_T.argsort(stable=True)
        ends_E = (expert_T[:, None] == torch.arange(score_TE.shape[1], device=x_TD.device)).sum(0).cumsum(0)
        ends_E, x_SD = ends_E.to(torch.int32), x_TD[order_S]
        hidden_SF = F.silu(F.grouped_mm(x_SD, self.w1.mT, offs=ends_E)) * F.grouped_mm(x_SD, self.w3.mT, offs=ends_E)
        y_SD = F.grouped_mm(hidden_SF, self.w2.mT, offs=ends_E)
        y_SD = (y_SD.float() * score_T[order_S, None]).to(x_TD.dtype)
        return torch.zeros_like(x_TD).scatter_add(0, order_S[:, None].expand_as(y_SD), y_SD)


def _grouped(shape: LayerShape) -> PeerLayer:
    module = _drawn(_GroupedLayer(shape), shape)
    graphs = shape.dtype == torch.bfloat16  # grouped_mm in fp32 fails in a graph
    note = "top-1 of 8; our words for torchtitan's method" + ("" if graphs else ", not compiled")
    return PeerLayer(module, module, shape.top_1_flops, graphs, note)


def _st_moe(shape: LayerShape) -> PeerLayer:
    from st_moe_pytorch import MoE  # pyright: ignore[reportMissingImports]

    mult = (shape.hidden_dim + 0.5) * 1.5 / shape.dim  # it takes int(dim * mult * 2 / 3)
    module = MoE(dim=shape.dim, num_experts=shape.experts, gating_top_n=2, expert_hidden_mult=mult)
    module = _drawn(module, shape._replace(dtype=torch.float32))  # its masks are fp32 whatever its weights are
    bf16 = shape.dtype == torch.bfloat16

    def forward(x_TD: Tensor) -> Tensor:
        with torch.autocast(shape.device.type, torch.bfloat16, enabled=bf16):
            return module(x_TD.float().view(shape.rows, shape.row_length, shape.dim))[0].flatten(0, 1)

    note = "top-2 of 8, capacity factor 1.25, dispatch by matmul, biases: more FLOPs than ours; not compiled"
    note += "; weights in fp32 under autocast" if bf16 else ""
    return PeerLayer(module, forward, None, False, note)


def _scatter_moe(shape: LayerShape) -> PeerLayer:
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    if shape.device.type != "cuda":
        raise ValueError("runs on a GPU alone")
    experts = GLUMLP(
        input_size=shape.dim, hidden_size=shape.hidden_dim, num_experts=shape.experts, top_k=1, activation=nn.SiLU()
    )
    module = _drawn(nn.ModuleDict({"gate": nn.Linear(shape.dim, shape.experts, bias=False), "experts": experts}), shape)

    def forward(x_TD: Tensor) -> Tensor:
        weight_TK, expert_TK = torch.softmax(module["gate"](x_TD).float(), -1).topk(1)
        return module["experts"](x_TD, weight_TK.to(x_TD.dtype), expert_TK)

    return PeerLayer(module, forward, shape.top_1_flops, True, "top-1 of 8")


EXTRA = "pip install -c constraints.txt 'moma[bench]'"
HF = EXTRA
LAYERS = {
    "transformers Mixtral eager": Entry(_transformers("Mixtral", "eager"), HF),
    "transformers Mixtral batched_mm": Entry(_transformers("Mixtral", "batched_mm"), HF),
    "transformers Mixtral grouped_mm": Entry(_transformers("Mixtral", "grouped_mm"), HF),
    "transformers OLMoE grouped_mm": Entry(_transformers("OLMoE", "grouped_mm"), HF),
    "transformers Qwen3-MoE grouped_mm": Entry(_transformers("Qwen3-MoE", "grouped_mm"), HF),
    "grouped_mm as in torchtitan": Entry(_grouped, "torch 2.11 or later has it"),
    "torchtitan": Entry(
        _torchtitan,
        "pip install --no-deps torchtitan==0.3.0 spmd-types==0.2.3 tyro==1.0.17 docstring-parser==0.18.0 "
        "typeguard==4.6.0 triton==3.6.0",
    ),
    "st-moe-pytorch": Entry(_st_moe, EXTRA),
    "ScatterMoE": Entry(_scatter_moe, "no package: its sources, and peers_path=FOLDER that holds scattermoe/"),
}


def _torch_head(shape: LayerShape) -> PeerHead:
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError("this torch has no linear_cross_entropy")
    return PeerHead(lambda h_TD, w_VD, target_T: function(h_TD, w_VD, target_T, ignore_index=IGNORE), False)


def _liger(shape: LayerShape) -> PeerHead:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    if shape.device.type != "cuda":
        raise ValueError("runs on a GPU alone")
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, lse_square_scale=Z_WEIGHT)
    return PeerHead(lambda h_TD, w_VD, target_T: loss(w_VD, h_TD, target_T), True)


def _cut_cross_entropy(shape: LayerShape) -> PeerHead:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    cuda = shape.device.type == "cuda"
    implementation = "cce_kahan_full_c" if cuda else "torch_compile"
    note = "keeps small gradients" if cuda else "its torch_compile form, logits at once"
    return PeerHead(
        lambda h_TD, w_VD, target_T: linear_cross_entropy(
            h_TD, w_VD, target_T, ignore_index=IGNORE, impl=implementation
        ),
        False,
        note,
    )


HEADS = {
    "torch linear_cross_entropy": Entry(_torch_head, "torch 2.13 has it"),
    "Liger": Entry(_liger, "pip install --no-deps liger-kernel==0.8.5 triton==3.6.0"),
    "cut-cross-entropy": Entry(_cut_cross_entropy, "pip install --no-deps cut-cross-entropy==25.1.1 triton==3.6.0"),
}
