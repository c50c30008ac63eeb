"""Feed-forwards: dense, and ONE sparse layer = partition (all | modality) x selection rule.

    y = sum over the experts that computed x of  g_e(x) FFN_e(x)      g = sigmoid(x W_g)     (MoMa Eq. 1)

`moe_8x` is the partition `all` with 8 experts; `moe_{m}t{n}i` (MoMa) is the partition `modality`, whose first,
deterministic routing stage is the modality of the input token. A group of one expert is a plain feed-forward:
no router, gate 1. Tokens nobody chose get an exact zero.

Keystone: a micro-batch holds exactly Q images, so group sizes and capacities are constants, and a layer is
gather -> batched matmul -> gather-sum with static shapes. The index sets (`TokenGroups`) come from the batcher,
once per micro-batch, shared by all layers. Data pipeline and router are one design.

Modes: `train` (the selection rule over the micro-batch: sees the future) and `aux` (auxiliary routers: causal,
dropless, so a token's result depends on its own past alone; data-dependent shapes, for inference only).

Legend: T tokens, N tokens of one group, E routed experts of the layer (all groups), K slots per expert, D dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.aux_routers import AuxRouter
from moma.model.experts import Experts, combine, dispatch, slots_of_tokens
from moma.model.precision import full_precision
from moma.model.routing import SELECTIONS, RouterStats
from moma.model.routing.expert_choice import ExpertChoiceConfig
from moma.schema import kind_field

Mode = Literal["train", "aux"]
CAUSAL_MODES = ("aux",)


@dataclass(frozen=True)
class DenseConfig:
    """One SwiGLU for every token."""

    kind: Literal["dense"] = "dense"

    def groups(self, modalities: tuple[str, ...]) -> tuple[int, ...]:
        """Experts per group of the partition: one group, one expert."""
        return (1,)


@dataclass(frozen=True)
class SparseConfig:
    """A sparse layer: `experts` per modality name, or `all: n` for one mixed group."""

    experts: dict[str, int]
    kind: Literal["sparse"] = "sparse"
    noise: Literal["none", "gumbel"] = "none"  # on the routers' logits, in pre-training only
    selection: ExpertChoiceConfig = kind_field(
        {name: rule.config for name, rule in SELECTIONS.items()}, default_factory=ExpertChoiceConfig
    )

    def groups(self, modalities: tuple[str, ...]) -> tuple[int, ...]:
        """Experts per group, in the order of `modalities`; raises ValueError where the names do not match."""
        need = ("all",) if "all" in self.experts else modalities
        if set(self.experts) != set(need):
            raise ValueError(
                f"got feed_forward.experts for {sorted(self.experts)}, need exactly {list(need)}: "
                "give a number per modality of the vocabulary, or `all` alone"
            )
        if min(self.experts.values()) < 1:
            raise ValueError(f"got feed_forward.experts={self.experts}, need at least 1 in every group")
        return tuple(self.experts[name] for name in need)


FEED_FORWARDS = {"dense": DenseConfig, "sparse": SparseConfig}
FeedForwardConfig = DenseConfig | SparseConfig


class DenseFeedForward(nn.Module):
    """The dense baseline: `Experts` with E = 1, so that it shares its numerics with every sparse layer."""

    n_routed = 0

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Experts(1, dim, hidden_dim)])

    def forward(
        self, x_TD: Tensor, groups: TokenGroups, mode: Mode, noise_TE: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(T, D) -> (T, D); groups, mode and noise make no difference."""
        return self.experts[0](x_TD[None])[0], None


class SparseFeedForward(nn.Module):
    """Groups of experts with a router per group; see the module docstring.

    `group_sizes`: experts per group, one entry for the partition `all`, else one per modality.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        group_sizes: tuple[int, ...],
        selection: ExpertChoiceConfig,
        aux_routers: bool,
    ) -> None:
        super().__init__()
        self.group_sizes, self.dim = group_sizes, dim
        self.n_routed = sum(size for size in group_sizes if size > 1)
        self.rule = SELECTIONS[selection.kind]
        self.shares = tuple(self.rule.share(selection.capacity_factor, size) for size in group_sizes)
        self.experts = nn.ModuleList(Experts(size, dim, hidden_dim) for size in group_sizes)
        # one projection for all groups: the routers W_g of Eq. 1 side by side
        self.router = nn.Parameter(torch.empty(dim, self.n_routed)) if self.n_routed else None
        self.aux = nn.ModuleList(AuxRouter(dim, size) for size in group_sizes if size > 1 and aux_routers)

    def forward(
        self, x_TD: Tensor, groups: TokenGroups, mode: Mode, noise_TE: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """(T, D) -> (T, D) and the routing decisions (None when no group has a router).

        `noise_TE` is added to the logits of the routed experts (see `routing/noise.py`).
        """
        if len(self.group_sizes) == 1:
            groups = groups.merged()
        stats, chosen = self._decide(x_TD, groups, noise_TE)
        if mode == "train":
            return self._batched(x_TD, groups, chosen), stats
        if stats is not None:
            if stats.aux_logit_TE is None:
                raise ValueError(
                    "got routing mode aux, need auxiliary routers in the model: train them with objective=aux_routers"
                )
            stats = stats._replace(selected_TE=(stats.aux_logit_TE > 0) & stats.member_TE)  # sigmoid > 0.5
        return self._dropless(x_TD, groups, stats), stats

    def _decide(
        self, x_TD: Tensor, groups: TokenGroups, noise_TE: Tensor | None
    ) -> tuple[RouterStats | None, list[tuple[Tensor, Tensor, Tensor]]]:
        """Scores and the training rule's choice: stats, and per routed group what `_batched` needs.

        That is flat `token_EK` (-1: empty slot), `gate_EK`, and the inverse map `slots_TE`.
        """
        if self.router is None:
            return None, []
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with full_precision(x_TD):
            all_logit_TE = x_TD.to(wide) @ self.router.to(wide)
            if noise_TE is not None:
                all_logit_TE = all_logit_TE + noise_TE
        n_tokens, chosen, columns, start = x_TD.shape[0], [], [], 0
        for m, size in enumerate(self.group_sizes):
            if size == 1:
                continue
            index_N, slot_T = groups.index[m], groups.slot[m]
            valid_N = None if groups.valid is None else groups.valid[m]
            logit_TE = all_logit_TE[:, start : start + size]
            logit_NE = logit_TE[index_N]
            token_EK, keep_EK = self.rule.select(logit_NE, self.shares[m], valid_N)
            gate_EK = torch.sigmoid(logit_NE.T.gather(1, token_EK))
            flat_EK = index_N[token_EK]
            if keep_EK is not None:
                flat_EK = torch.where(keep_EK, flat_EK, -1)
            slots_TE = slots_of_tokens(flat_EK, n_tokens)
            chosen.append((flat_EK, gate_EK, slots_TE))
            member_TE = (slot_T >= 0)[:, None].expand(n_tokens, size)
            aux_TE = None
            if len(self.aux):
                aux_NE = self.aux[len(columns)](x_TD[index_N])
                # invalid slots of the padded form point at token 0; the inverse map leaves them out
                aux_TE = combine(aux_NE, slot_T[:, None], self._live(index_N, valid_N))
            columns.append(
                (slots_TE >= 0, torch.where(member_TE, torch.sigmoid(logit_TE.detach()), 0), aux_TE, member_TE)
            )
            start += size
        selected_TE, score_TE, member_TE = (torch.cat([c[i] for c in columns], 1) for i in (0, 1, 3))
        aux_TE = torch.cat([c[2] for c in columns], 1) if len(self.aux) else None
        return RouterStats(selected_TE, score_TE, selected_TE, aux_TE, member_TE), chosen

    @staticmethod
    def _live(index_N: Tensor, valid_N: Tensor | None) -> Tensor:
        return index_N if valid_N is None else torch.where(valid_N, index_N, -1)

    def _batched(
        self,
        x_TD: Tensor,
        groups: TokenGroups,
        chosen: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        """gather -> batched matmul -> gather-sum, group after group."""
        routed = iter(chosen)
        y_TD: Tensor | None = None
        for m, size in enumerate(self.group_sizes):
            if size == 1:
                valid_N = None if groups.valid is None else groups.valid[m]
                token_EK, gate_EK = self._live(groups.index[m], valid_N)[None], None
                slots_TC = groups.slot[m][:, None]
            else:
                token_EK, gate_EK, slots_TC = next(routed)
            token_S = token_EK.reshape(-1)
            x_EKD = dispatch(x_TD, token_S, slots_TC).view(*token_EK.shape, self.dim)
            y_SD = self.experts[m](x_EKD, gate_EK).flatten(0, 1)
            group_TD = combine(y_SD, slots_TC, token_S)
            y_TD = group_TD if y_TD is None else y_TD + group_TD
        assert y_TD is not None
        return y_TD

    def _dropless(self, x_TD: Tensor, groups: TokenGroups, stats: RouterStats | None) -> Tensor:
        """Every selected (token, expert) pair, one expert after the other; shapes depend on the data."""
        y_TD, column = torch.zeros_like(x_TD), 0
        for m, size in enumerate(self.group_sizes):
            experts = self.experts[m]
            assert isinstance(experts, Experts)
            for e in range(size):
                if size == 1:
                    rows_N, gate_N = (groups.slot[m] >= 0).nonzero().squeeze(1), None
                else:
                    assert stats is not None
                    rows_N = stats.selected_TE[:, column].nonzero().squeeze(1)
                    gate_N = stats.score_TE[rows_N, column]
                    column += 1
                y_ND = experts.one(e, x_TD[rows_N], gate_N)
                y_TD = y_TD.index_add(0, rows_N, y_ND.to(y_TD.dtype))  # rows are distinct: deterministic
        return y_TD


def build_feed_forward(
    config: FeedForwardConfig, dim: int, hidden_dim: int, modalities: tuple[str, ...], aux_routers: bool
) -> DenseFeedForward | SparseFeedForward:
    """The module of one layer; raises ValueError if `config.experts` does not name the vocabulary's modalities."""
    if isinstance(config, DenseConfig):
        return DenseFeedForward(dim, hidden_dim)
    sizes = config.groups(modalities)
    return SparseFeedForward(dim, hidden_dim, sizes, config.selection, aux_routers)
