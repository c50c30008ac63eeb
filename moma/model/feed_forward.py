"""Feed-forwards: dense, and ONE sparse layer = partition (all | modality) x selection rule x optional shared experts.

    y = sum over the experts that computed x of  g_e(x) FFN_e(x)   +   sum over shared experts of FFN_s(x)

`moe_8x` is the partition `all` with 8 experts; `moe_{m}t{n}i` (MoMa) is the partition `modality`, whose first,
deterministic routing stage is the modality of the input token. A group of one expert is a plain feed-forward: no
router, gate 1. Tokens nobody chose get an exact zero (beside the shared experts). The rules are in `routing/`.

Keystone: a micro-batch holds exactly Q images, so group sizes and capacities are constants, and a layer is
gather -> batched matmul -> gather-sum with static shapes. The index sets (`TokenGroups`) come from the batcher,
once per micro-batch, shared by all layers. Data pipeline and router are one design.

Modes: `train` is the selection rule over the micro-batch; expert choice sees the future. The others are causal: a
token's experts depend on its own state alone, nothing is dropped, shapes depend on the data (inference only).

    aux               auxiliary routers, chosen above probability 0.5 (MoMa section 2.4)
    aux_calibrated    auxiliary routers, chosen above the cut-off at which they take as many tokens as the rule does
    threshold         the main router's logit above its moving cut-off

A rule that needs no other token (token choice, expert threshold) decides by itself in every causal mode.

Legend: T tokens, N tokens of one group, E routed experts of the layer (all groups), D dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moma.modality import TokenGroups
from moma.model.aux_routers import AuxRouter, none_for
from moma.model.experts import Experts, run
from moma.model.precision import autocast, full_precision
from moma.model.routing import SELECTIONS, Choice, Disturbance, Group, RouterStats, State
from moma.model.routing.cutoff import AUX_STATE, aux_average, cutoff_of, falling
from moma.model.routing.expert_choice import ExpertChoiceConfig
from moma.model.routing.rule import register_state, state_of, write_state
from moma.model.slots import Slots, combine, dispatch, equal_slots, gather_sum, ragged_slots
from moma.schema import kind_field

Mode = Literal["train", "aux", "aux_calibrated", "threshold"]
CAUSAL_MODES = ("aux", "aux_calibrated", "threshold")
AUX_MODES = ("aux", "aux_calibrated")
UNDISTURBED = Disturbance()
SelectionConfig = Any  # the config of one of SELECTIONS


@dataclass(frozen=True)
class DenseConfig:
    """One SwiGLU for every token."""

    kind: Literal["dense"] = "dense"


@dataclass(frozen=True)
class SparseConfig:
    """Sparse layers: `experts` per modality name, or `all: n` for one mixed group; a list gives one number per sparse
    layer.

    `layers`: which are sparse (interval: 0, 2, 4, ...), the others are dense. `width`: of an expert, as a share of the
    dense SwiGLU's. `shared`: experts of that width which compute every token. `noise` on the routers' logits exists in
    pre-training only; `upcycled`: only in a run that `moma upcycle` began.
    """

    experts: dict[str, int | tuple[int, ...]]
    kind: Literal["sparse"] = "sparse"
    layers: Literal["all", "interval", "first_half", "second_half"] | tuple[int, ...] = "all"
    width: float = 1.0
    shared: int = 0
    noise: Literal["none", "gumbel", "upcycled"] = "none"
    selection: SelectionConfig = kind_field(
        {name: rule.config for name, rule in SELECTIONS.items()}, default_factory=ExpertChoiceConfig
    )

    def __post_init__(self) -> None:
        if self.width <= 0 or self.shared < 0:
            raise ValueError(
                f"got width={self.width} and shared={self.shared}, need width > 0 and shared >= 0: change feed_forward"
            )
        if self.noise != "none" and SELECTIONS[self.selection.kind].draws:
            raise ValueError(
                f"got noise={self.noise} for selection.kind={self.selection.kind}, need noise=none: Gumbel-sigmoid "
                "noise is for sigmoid routers, token choice draws its own (second_choice)"
            )

    def sparse_layers(self, n_layers: int) -> tuple[int, ...]:
        """Numbers of the sparse layers, from 0; raises ValueError for one that does not exist, and for a list of
        expert numbers of another length."""
        named = {
            "all": range(n_layers),
            "interval": range(0, n_layers, 2),
            "first_half": range(n_layers // 2),
            "second_half": range(n_layers // 2, n_layers),
        }
        chosen = tuple(named[self.layers]) if isinstance(self.layers, str) else self.layers
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= min(chosen) <= max(chosen) < n_layers:
            raise ValueError(
                f"got feed_forward.layers={self.layers}, need rising layer numbers from 0 to {n_layers - 1}: change it"
            )
        for name, wanted in self.experts.items():
            if isinstance(wanted, tuple) and len(wanted) != len(chosen):
                raise ValueError(
                    f"got {len(wanted)} entries in feed_forward.experts.{name}, need one for each of the "
                    f"{len(chosen)} sparse layers: give as many, or one number"
                )
        return chosen

    def groups(self, modalities: tuple[str, ...], place: int = 0) -> dict[str, int]:
        """Experts per group of the `place`-th sparse layer, in the order of `modalities`.

        Raises ValueError where the names do not match.
        """
        need = ("all",) if "all" in self.experts else modalities
        if set(self.experts) != set(need):
            raise ValueError(
                f"got feed_forward.experts for {sorted(self.experts)}, need exactly {list(need)}: "
                "give a number per modality of the vocabulary, or `all` alone"
            )
        sizes = {}
        for name in need:
            wanted = self.experts[name]
            sizes[name] = wanted[place] if isinstance(wanted, tuple) else wanted
        if min(sizes.values()) < 1:
            raise ValueError(f"got feed_forward.experts={self.experts}, need at least 1 in every group: raise it")
        return sizes


FEED_FORWARDS = {"dense": DenseConfig, "sparse": SparseConfig}
FeedForwardConfig = DenseConfig | SparseConfig


class DenseFeedForward(nn.Module):
    """The dense baseline: `Experts` with E = 1, so that it shares its numerics with every sparse layer."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Experts(1, dim, hidden_dim)])

    def forward(
        self,
        x_TD: Tensor,
        groups: TokenGroups,
        mode: Mode,
        disturbance: Disturbance = UNDISTURBED,
        statistics: bool = True,
    ) -> tuple[Tensor, None]:
        """(T, D) -> (T, D); the other arguments make no difference."""
        return self.experts[0](x_TD), None


class SparseFeedForward(nn.Module):
    """Groups of experts with a router per group; see the module docstring.

    `groups`: experts per group, `{"all": n}`, else one entry per modality in their order.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        groups: dict[str, int],
        selection: SelectionConfig,
        aux_routers: bool,
        shared: int = 0,
    ) -> None:
        super().__init__()
        self.groups, self.selection, self.rule = groups, selection, SELECTIONS[selection.kind]
        self.n_routed = sum(size for size in groups.values() if size > 1)
        self.shares = {name: self.rule.share(selection, name, size) for name, size in groups.items() if size > 1}
        self.experts = nn.ModuleList(Experts(size, dim, hidden_dim) for size in groups.values())
        self.shared = Experts(1, dim, shared * hidden_dim) if shared else None
        # one projection for all groups: the routers W_g of Eq. 1 side by side
        self.router = nn.Parameter(torch.empty(dim, self.n_routed)) if self.n_routed else None
        aux_routers = aux_routers and self.rule.alone is None
        self.aux = nn.ModuleList(AuxRouter(dim, size) for size in groups.values() if size > 1 and aux_routers)
        own = self.rule.state if self.n_routed else ()
        register_state(self, own + (AUX_STATE if len(self.aux) else ()), self.n_routed)

    @property
    def needs_future(self) -> bool:
        """Whether the training rule looks at other tokens, so that causal inference needs another one."""
        return self.n_routed > 0 and self.rule.alone is None

    def routing_state(self) -> State:
        """The explicit routing state by name, fp32 (E,) each."""
        return state_of(self)

    @torch.no_grad()
    def update_routing(self, observed: State) -> None:
        """New routing state from what the step's micro-batches observed on average; the loop's business alone."""
        state = self.routing_state()
        new = state if self.rule.update is None else self.rule.update(self.selection, state, observed)
        write_state(self, aux_average(new, observed) if len(self.aux) else new)

    def forward(
        self,
        x_TD: Tensor,
        groups: TokenGroups,
        mode: Mode,
        disturbance: Disturbance = UNDISTURBED,
        statistics: bool = True,
    ) -> tuple[Tensor, RouterStats | None]:
        """(T, D) -> (T, D) and the routing decisions (None when no group has a router).

        `statistics=False`: None in any case. Decoding reads none, and those of one token cost more than its experts.
        """
        if "all" in self.groups:
            groups = groups.merged()
        low_TD = autocast(x_TD)
        slots, stats = self._route(x_TD, low_TD, groups, mode, disturbance, statistics)
        y_TD = run(slots, low_TD)
        return (y_TD if self.shared is None else y_TD + self.shared(low_TD)), stats

    def _route(
        self,
        x_TD: Tensor,
        low_TD: Tensor,
        groups: TokenGroups,
        mode: Mode,
        disturbance: Disturbance,
        statistics: bool,
    ) -> tuple[list[tuple[Experts, Slots]], RouterStats | None]:
        """Who computes what, group after group."""
        logit_TE = self._logits(x_TD, low_TD)
        slots: list[tuple[Experts, Slots]] = []
        routed: list[RouterStats] = []
        start, n_routers = 0, 0
        for m, (name, size) in enumerate(self.groups.items()):
            index_N, slot_T, experts = groups.index[m], groups.slot[m], cast(Experts, self.experts[m])
            valid_N = None if groups.valid is None else groups.valid[m]
            columns, router = slice(start, start + size), n_routers
            if size > 1:
                start, n_routers = start + size, n_routers + 1
            if not statistics and index_N.numel() == 0:  # a token has one modality
                continue
            if size == 1:  # of the padded form, only the slots that hold a token are computed
                ends_E = None if valid_N is None else valid_N.sum()[None]
                slots.append((experts, Slots(_live(index_N, valid_N), None, slot_T[:, None], ends_E)))
                continue
            assert logit_TE is not None
            noise_TE, flip_TE = disturbance.noise_TE, disturbance.flip_TE
            group = Group(
                name,
                {key: value[columns] for key, value in self.routing_state().items()},
                valid_N,
                None if noise_TE is None else noise_TE[index_N, columns].to(logit_TE.dtype),
                self.shares[name],
            )
            aux = self.aux[router] if len(self.aux) else None
            aux_NE = None if aux is None else aux(x_TD[index_N])
            flip_NE = None if flip_TE is None else flip_TE[index_N, columns]
            logit_NE = dispatch(logit_TE[:, columns], index_N, slot_T[:, None])
            found, stats = self._route_group(logit_NE, aux_NE, flip_NE, group, index_N, slot_T, mode, statistics)
            slots.append((experts, found))
            if stats is not None:
                routed.append(stats)
        return slots, _side_by_side(routed)

    def _logits(self, x_TD: Tensor, low_TD: Tensor) -> Tensor | None:
        """Logits (T, E) of all routed experts in at least fp32, whatever autocast says."""
        if self.router is None:
            return None
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with full_precision(x_TD):
            out: Any = _RouterLogits.apply(x_TD.to(wide), low_TD.detach(), self.router.to(wide))
        return out

    def _route_group(
        self,
        logit_NE: Tensor,
        aux_NE: Tensor | None,
        flip_NE: Tensor | None,
        group: Group,
        index_N: Tensor,
        slot_T: Tensor,
        mode: Mode,
        statistics: bool,
    ) -> tuple[Slots, RouterStats | None]:
        n_tokens, rule, config = slot_T.numel(), self.rule, self.selection
        choice: Choice | None = None
        ruled: Slots | None = None
        reference_TE: Tensor | None = None
        if mode == "train" or statistics:
            choice = rule.choose(config, logit_NE, group)
            ruled = _slots(choice, index_N, n_tokens)
            reference_TE = ruled.slots_TC >= 0
        if mode == "train" and flip_NE is None:
            assert choice is not None and ruled is not None
            gate_NE, slots = choice.gate_NE, ruled
        else:
            if mode == "train":
                assert flip_NE is not None and reference_TE is not None
                selected_NE = reference_TE[index_N] ^ flip_NE
            else:
                selected_NE = self._alone(logit_NE, aux_NE, group.state, mode)
            if group.valid_N is not None:
                selected_NE = selected_NE & group.valid_N[:, None]
            gate_NE = rule.gate(config, logit_NE, selected_NE)
            # the number of pairs depends on the data: causal modes and planted errors are for evaluation
            slots = ragged_slots(selected_NE, gate_NE, int(selected_NE.sum()), index_N, n_tokens)
        if not statistics:
            return slots, None
        member_TE = (slot_T >= 0)[:, None].expand(n_tokens, logit_NE.shape[1])
        aux_TE, observed = None, {} if choice is None else dict(choice.observed)
        if aux_NE is not None:
            # invalid slots of the padded form point at token 0; the inverse map leaves them out
            aux_TE = combine(aux_NE, slot_T[:, None], _live(index_N, group.valid_N))
            if reference_TE is not None:
                falling_EN, _ = falling(aux_NE, group.valid_N)
                observed["aux_cutoff"] = cutoff_of(falling_EN, reference_TE.sum(0))
        dropped_NE = None if choice is None else choice.dropped_NE
        stats = RouterStats(
            selected_TE=slots.slots_TC >= 0,
            score_TE=gather_sum(gate_NE.detach(), slot_T[:, None]),
            reference_TE=reference_TE,
            aux_logit_TE=aux_TE,
            member_TE=member_TE,
            dropped_TE=None if dropped_NE is None else gather_sum(dropped_NE, slot_T[:, None]),
            losses={} if choice is None else choice.losses,
            observed=observed,
        )
        return slots, stats

    def _alone(self, logit_NE: Tensor, aux_NE: Tensor | None, state: State, mode: Mode) -> Tensor:
        """The causal decision (N, E) of every token by itself."""
        if self.rule.alone is not None:
            return self.rule.alone(self.selection, logit_NE, state)
        if mode == "threshold":
            return logit_NE > state["cutoff"]
        if aux_NE is None:
            raise none_for(mode)
        return aux_NE > (0 if mode == "aux" else state["aux_cutoff"])  # 0: probability 0.5


class _RouterLogits(torch.autograd.Function):
    """x W in fp32. The weights' gradient reads x in the experts' type, which is kept anyway, instead of keeping it in
    fp32 as well: without autocast the same, else rounded as every matrix's gradient is."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, low_TD: Tensor, router_DE: Tensor) -> Tensor:
        ctx.save_for_backward(low_TD, router_DE)
        return F.linear(x_TD, router_DE.T.contiguous())  # the order in which a CPU takes narrow matrices fastest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (dlogit_TE,) = grads
        low_TD, router_DE = ctx.saved_tensors
        dx_TD = dlogit_TE @ router_DE.T if ctx.needs_input_grad[0] else None
        drouter_DE = (dlogit_TE.T @ low_TD.to(dlogit_TE.dtype)).T if ctx.needs_input_grad[2] else None
        return dx_TD, None, drouter_DE


def _slots(choice: Choice, index_N: Tensor, n_tokens: int) -> Slots:
    """A rule's decision as slots, in the equal form where it is exact."""
    if choice.token_EK is not None:
        gate_EK = choice.gate_NE.T.gather(1, choice.token_EK)
        return equal_slots(index_N[choice.token_EK], gate_EK, n_tokens)
    assert choice.selected_NE is not None
    return ragged_slots(choice.selected_NE, choice.gate_NE, choice.bound, index_N, n_tokens)


def _live(index_N: Tensor, valid_N: Tensor | None) -> Tensor:
    """Flat tokens of a group, -1 where a slot holds none."""
    return index_N if valid_N is None else torch.where(valid_N, index_N, -1)


def _side_by_side(groups: list[RouterStats]) -> RouterStats | None:
    """The statistics of all groups as one."""
    if not groups:
        return None

    def columns(parts: Iterable[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present, -1) if len(present) == len(groups) else None

    losses: dict[str, Tensor] = {}
    for group in groups:
        for name, value in group.losses.items():
            losses[name] = losses[name] + value if name in losses else value
    tensors = zip(*(group[:6] for group in groups), strict=True)
    observed = {name: torch.cat([group.observed[name] for group in groups]) for name in groups[0].observed}
    return RouterStats(*(columns(parts) for parts in tensors), losses, observed)  # type: ignore[arg-type]


def experts_per_token(layer: SparseFeedForward, shares: tuple[float, ...]) -> float:
    """Nominal number of routed experts (and experts without router) that compute a mean token, given the fraction of
    tokens per modality; a group of one expert computes every token of it."""
    shares = (1.0,) if "all" in layer.groups else shares
    groups = zip(shares, layer.groups.items(), strict=True)
    return float(sum(s * (1 if size == 1 else layer.shares[name] * size) for s, (name, size) in groups))


def build_feed_forward(
    config: FeedForwardConfig,
    layer: int,
    n_layers: int,
    dim: int,
    hidden_dim: int,
    modalities: tuple[str, ...],
    aux_routers: bool,
) -> DenseFeedForward | SparseFeedForward:
    """The module of one layer of `n_layers`; raises ValueError if `config.experts` or `config.layers` do not fit."""
    sparse = () if isinstance(config, DenseConfig) else config.sparse_layers(n_layers)
    if isinstance(config, DenseConfig) or layer not in sparse:
        return DenseFeedForward(dim, hidden_dim)
    groups = config.groups(modalities, sparse.index(layer))
    width = Fraction(config.width).limit_denominator(1000) * hidden_dim
    expert_dim = hidden_dim if config.width == 1 else -(-width // 16) * 16
    return SparseFeedForward(dim, int(expert_dim), groups, config.selection, aux_routers, config.shared)
