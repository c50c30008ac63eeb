"""Mixture of depths: a block that computes a part of the tokens, the others pass (MoMa section 2.3; 2404.02258).

    score = sigmoid(x W_d)              the k_d = floor(c_d T) best tokens of the micro-batch, in their order
    out   = x + score * update(x)       for these, update = what attention and feed-forward add, after their norms
    out   = x                           for the others

`mod` chooses batch-wide and blind to modality, as the paper does. The number of chosen tokens is a constant, of text
and of image tokens among them it is not: what depends on modality inside runs grouped matmuls over padded groups.
`mod_quota` takes floor(c_d N_M) tokens of every modality M (an idea that the paper names and did not try): all inner
counts are constants. The chosen tokens form one flat sequence by (row, position), keep their original positions, and
attend to each other alone, inside their documents.

The gate multiplies the update after its norms. Before them it would cancel out, rms_norm(g v) = rms_norm(v), and the
router would learn next to nothing (shown in `tests/model/test_depth.py`).

Causal modes decide for each token by itself, as in `feed_forward.py`: `aux` and `aux_calibrated` by an auxiliary
router, `threshold` by the moving cut-off of the score. With caches every token is computed and those that the router
leaves out are undone and hidden from later tokens: nothing is saved, the numbers are the same.

Legend: T tokens, K chosen slots, C groups of the choice (1, or one per modality), R rows, L positions, D dim.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.attention import Attention, AttentionMask, Rotation, at_tokens, document_mask
from moma.model.aux_routers import AuxRouter, none_for
from moma.model.block import Block, NormOrder
from moma.model.feed_forward import (
    UNDISTURBED,
    DenseFeedForward,
    Mode,
    SparseFeedForward,
)
from moma.model.precision import full_precision
from moma.model.routing import Disturbance, RouterStats, State
from moma.model.routing.cutoff import AUX_STATE, CUTOFF_DECAY, aux_average, cutoff_of, falling, moving_average
from moma.model.routing.expert_choice import taken
from moma.model.routing.rule import register_state, state_of, write_state
from moma.model.slots import combine, dispatch, gather_sum, slots_of_tokens

ROOM = 1024  # slots: see `_room`


@dataclass(frozen=True)
class FullDepthConfig:
    """Every block computes every token."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True)
class DepthConfig:
    """Layers `start`, `start + interval`, ... compute the share `capacity` of the tokens (the paper's values)."""

    kind: Literal["mod", "mod_quota"] = "mod"
    capacity: float = 0.25
    interval: int = 2
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1 or self.interval < 1 or self.start < 0:
            raise ValueError(
                f"got capacity={self.capacity}, interval={self.interval}, start={self.start}, need 0 < capacity <= 1, "
                "interval >= 1, start >= 0: change depth"
            )

    def chosen(self, layer: int) -> bool:
        """Whether this layer has a depth router."""
        return layer >= self.start and (layer - self.start) % self.interval == 0


DEPTHS = {"full": FullDepthConfig, "mod": DepthConfig, "mod_quota": DepthConfig}


class Chosen(NamedTuple):
    """Tokens that a depth router lets in: `token_K` int64, ascending, -1 in empty slots, which come last.

    `slot_T` int64: the slot of each token, or -1.
    """

    token_K: Tensor
    slot_T: Tensor


class DepthBlock(Block):
    """A block behind a depth router."""

    def __init__(
        self,
        dim: int,
        attention: Attention,
        feed_forward: DenseFeedForward | SparseFeedForward,
        norm_order: NormOrder,
        norm_eps: float,
        config: DepthConfig,
        n_modalities: int,
        aux_routers: bool,
    ) -> None:
        super().__init__(dim, attention, feed_forward, norm_order, norm_eps)
        self.quota, self.capacity = config.kind == "mod_quota", Fraction(config.capacity).limit_denominator(10_000)
        self.depth_router = nn.Parameter(torch.empty(dim, 1))
        self.aux = AuxRouter(dim, 1) if aux_routers else None
        state = ("cutoff", "age", *(AUX_STATE if aux_routers else ()))
        register_state(self, state, n_modalities if self.quota else 1)

    def routing_state(self) -> State:
        """The explicit routing state by name, fp32 (C,) each."""
        return state_of(self)

    @torch.no_grad()
    def update_routing(self, observed: State) -> None:
        """New moving cut-offs from what the step's micro-batches observed on average."""
        new = moving_average(self.routing_state(), observed, CUTOFF_DECAY)
        write_state(self, new if self.aux is None else aux_average(new, observed))

    def forward(
        self,
        x_RLD: Tensor,
        position: Tensor | Rotation,
        mask: AttentionMask,
        groups: TokenGroups,
        mode: Mode,
        cache: Any = None,
        disturbance: Disturbance = UNDISTURBED,
    ) -> tuple[Tensor, dict[str, RouterStats]]:
        """One block; statistics of the experts under "" (of the tokens let in), of the depth router under ".depth"."""
        x_TD = x_RLD.flatten(0, 1)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with full_precision(x_TD):
            logit_T = (x_TD.to(wide) @ self.depth_router.to(wide))[:, 0]
        aux_T = None if self.aux is None else self.aux(x_TD)[:, 0]
        parts = groups if self.quota else groups.merged()
        if cache is not None:
            return self._cached(x_RLD, position, mask, groups, parts, mode, cache, logit_T, aux_T)
        score_T = torch.sigmoid(logit_T)
        ranked_T, observed = self._rank(logit_T, aux_T, parts)
        in_T, flip_TE = ranked_T, disturbance.depth_flip_TE
        by_rule = mode == "train" and flip_TE is None
        if mode != "train":
            in_T = self._alone(logit_T, aux_T, parts, mode)
        elif flip_TE is not None:
            in_T = (ranked_T ^ flip_TE.any(1)) & _member(parts).any(1)
        # causal modes and planted errors are for evaluation: there the number may depend on the data
        token_K, slot_T = _slots(in_T, self._bound(parts) if by_rule else _room(in_T))
        assert mask.document_RL is not None
        x_KD = dispatch(x_TD, token_K, slot_T[:, None])
        inner = UNDISTURBED._replace(
            noise_TE=_rows(disturbance.noise_TE, token_K), flip_TE=_rows(disturbance.flip_TE, token_K)
        )
        a_1KD, y_1KD, stats = self.updates(
            x_KD[None],
            at_tokens(position, token_K),
            document_mask(_documents(mask.document_RL, token_K)),
            self._inner(groups, token_K, by_rule),
            mode,
            None,
            inner,
        )
        gate_K1 = dispatch(score_T[:, None], token_K, slot_T[:, None])
        update_KD = gate_K1 * (a_1KD.to(wide) + y_1KD)[0]
        update_TD = combine(update_KD, slot_T[:, None], token_K)
        found = {"": _whole(stats, slot_T)} if stats is not None else {}
        found[".depth"] = self._stats(slot_T >= 0, ranked_T, score_T, aux_T, parts, observed)
        return x_RLD + update_TD.view(x_RLD.shape), found

    def _cached(
        self,
        x_RLD: Tensor,
        position: Tensor | Rotation,
        mask: AttentionMask,
        groups: TokenGroups,
        parts: TokenGroups,
        mode: Mode,
        cache: Any,
        logit_T: Tensor,
        aux_T: Tensor | None,
    ) -> tuple[Tensor, dict[str, RouterStats]]:
        """Every token computed; those left out undone, and hidden from later tokens of this layer."""
        in_RL = self._alone(logit_T, aux_T, parts, mode).view(x_RLD.shape[:2])
        seen = mask._replace(keys=mask.keys & cache.let_in(in_RL))
        a_RLD, y_RLD, _ = self.updates(x_RLD, position, seen, groups, mode, cache, UNDISTURBED)
        gate_RL1 = torch.sigmoid(logit_T).view(*in_RL.shape, 1)
        update_RLD = gate_RL1 * (a_RLD.to(gate_RL1.dtype) + y_RLD)
        return x_RLD + torch.where(in_RL[..., None], update_RLD, 0), {}

    def _rank(self, logit_T: Tensor, aux_T: Tensor | None, parts: TokenGroups) -> tuple[Tensor, State]:
        """The training rule: the best tokens of every part, bool (T,), and what the moving cut-offs need of it."""
        cutoffs, aux_cutoffs, n_tokens = [], [], logit_T.numel()
        # the last place collects the slots without a token, and is cut off; all other targets are distinct
        in_T = torch.zeros(n_tokens + 1, dtype=torch.bool, device=logit_T.device)
        for c, index_N in enumerate(parts.index):
            valid_N = None if parts.valid is None else parts.valid[c]
            falling_1N, order_1N = falling(logit_T[index_N][:, None], valid_N)
            taken_1N, count_1 = taken(order_1N, self.capacity, valid_N)
            cutoffs.append(cutoff_of(falling_1N, count_1))
            if aux_T is not None:
                aux_cutoffs.append(cutoff_of(falling(aux_T[index_N][:, None], valid_N)[0], count_1))
            in_T = in_T.scatter(0, index_N if valid_N is None else torch.where(valid_N, index_N, n_tokens), taken_1N[0])
        observed = {"cutoff": torch.cat(cutoffs)}
        if aux_T is not None:
            observed["aux_cutoff"] = torch.cat(aux_cutoffs)
        return in_T[:n_tokens], observed

    def _share(self, n_tokens: int) -> int:
        """floor(c_d n)."""
        return self.capacity.numerator * n_tokens // self.capacity.denominator

    def _bound(self, parts: TokenGroups) -> int:
        """How many tokens the training rule takes: the exact number, or of padded groups the most it can be."""
        if parts.valid is None:
            return sum(self._share(index_N.numel()) for index_N in parts.index)
        return self._share(parts.slot[0].numel())

    def _alone(self, logit_T: Tensor, aux_T: Tensor | None, parts: TokenGroups, mode: Mode) -> Tensor:
        """The causal decision of every token by itself, bool (T,)."""
        state, member_TC = self.routing_state(), _member(parts)
        if mode == "threshold":
            above_TC = logit_T[:, None] > state["cutoff"]
        elif aux_T is None:
            raise none_for(mode)
        else:
            above_TC = aux_T[:, None] > (0 if mode == "aux" else state["aux_cutoff"])
        return (above_TC & member_TC).any(1)

    def _inner(self, groups: TokenGroups, token_K: Tensor, by_rule: bool) -> TokenGroups:
        """The modality groups of the chosen tokens; exact where their numbers are constants."""
        exact, n_slots = groups.valid is None, token_K.numel()
        if self._blind() and (exact or not by_rule):  # a slot without a token is computed for nobody
            every_K = torch.arange(n_slots, device=token_K.device)
            return TokenGroups((every_K,), (every_K,))
        members = [torch.where(token_K >= 0, slot_T[token_K.clamp(min=0)], -1) >= 0 for slot_T in groups.slot]
        if exact and by_rule and self.quota:
            sizes = [self._share(index_N.numel()) for index_N in groups.index]
            found = [_slots(in_K, size) for in_K, size in zip(members, sizes, strict=True)]
            return TokenGroups(tuple(c.token_K for c in found), tuple(c.slot_T for c in found))
        found = [_slots(in_K, n_slots) for in_K in members]
        return TokenGroups(
            tuple(c.token_K.clamp(min=0) for c in found),
            tuple(c.slot_T for c in found),
            tuple(c.token_K >= 0 for c in found),
        )

    def _blind(self) -> bool:
        """Whether nothing inside asks for a token's modality."""
        layer = self.feed_forward
        return self.attention.n_modalities is None and (isinstance(layer, DenseFeedForward) or "all" in layer.groups)

    @staticmethod
    def _stats(
        in_T: Tensor, ranked_T: Tensor, score_T: Tensor, aux_T: Tensor | None, parts: TokenGroups, observed: State
    ) -> RouterStats:
        member_TC = _member(parts)
        return RouterStats(
            selected_TE=in_T[:, None] & member_TC,
            score_TE=torch.where(member_TC, score_T.detach()[:, None], 0),
            reference_TE=ranked_T[:, None] & member_TC,
            aux_logit_TE=None if aux_T is None else torch.where(member_TC, aux_T[:, None], 0),
            member_TE=member_TC,
            observed=observed,
        )


def _room(in_T: Tensor) -> int:
    """Slots for a number of tokens that depends on the data (causal modes are for inference): just enough, on a GPU a
    multiple of ROOM, so that its compiled attention sees few shapes."""
    need, n_tokens = int(in_T.sum()), in_T.numel()
    return min(n_tokens, -(-need // ROOM) * ROOM) if in_T.is_cuda else need


def _member(parts: TokenGroups) -> Tensor:
    """Which group each token belongs to: bool (T, C)."""
    return torch.stack([slot_T >= 0 for slot_T in parts.slot], 1)


def _slots(in_T: Tensor, bound: int) -> Chosen:
    """The tokens of a mask, in `bound` slots."""
    rank_T = in_T.cumsum(0) - 1
    slot_T = torch.where(in_T & (rank_T < bound), rank_T, -1)
    return Chosen(slots_of_tokens(slot_T[None], bound)[:, 0], slot_T)


def _documents(document_RL: Tensor, token_K: Tensor) -> Tensor:
    """Document numbers (1, K) that tell rows apart; empty slots are a document of their own."""
    row_RL = torch.arange(document_RL.shape[0], device=document_RL.device)[:, None]
    one_T = (document_RL.to(torch.int64) + 1 + row_RL * (document_RL.shape[1] + 2)).flatten()
    return torch.where(token_K >= 0, one_T[token_K.clamp(min=0)], -1)[None]


def _rows(values_TE: Tensor | None, token_K: Tensor) -> Tensor | None:
    return None if values_TE is None else values_TE[token_K.clamp(min=0)]


def _whole(stats: RouterStats, slot_T: Tensor) -> RouterStats:
    """Statistics of the chosen tokens at their places among all; the others belong to no group."""

    def spread(values_KE: Tensor | None) -> Tensor | None:
        return None if values_KE is None else gather_sum(values_KE, slot_T[:, None])

    fields = ("selected_TE", "score_TE", "reference_TE", "aux_logit_TE", "member_TE", "dropped_TE")
    return stats._replace(**{name: spread(getattr(stats, name)) for name in fields})
