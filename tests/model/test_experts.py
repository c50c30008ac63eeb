"""Experts with equal and with differing numbers of rows, against loops: float64, one token and one expert at a time.

y_t = sum over the experts e that hold t of  g_et W2_e (silu(x_t W1_e) * (x_t W3_e))
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moma.model import experts as experts_module
from moma.model import grouped_matmul as module
from moma.model.experts import Experts, run
from moma.model.grouped_matmul import grouped_matmul
from moma.model.precision import autocast as cast
from moma.model.slots import Slots, combine, dispatch, equal_slots, ragged_slots, slots_of_tokens

DIM, HIDDEN, N_TOKENS = 6, 5, 11
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

# which experts (rows of digits) compute which rows of the group; one string per row
LOADS = {
    "mixed": ["0", "02", "", "1", "012", "2", "", "0"],
    "empty_first": ["1", "2", "12", "", "1", "", "2", "1"],
    "empty_middle": ["0", "2", "02", "0", "", "", "2", "0"],
    "empty_last": ["0", "1", "01", "0", "", "", "1", "0"],
    "one_has_all": ["1"] * 8,
    "everyone": ["012"] * 8,
    "nobody": [""] * 8,
    "one_row": ["02"],
    "no_rows": [],
}


def new_experts(n_experts=3, dtype=torch.float64, dim=DIM, hidden=HIDDEN):
    experts = Experts(n_experts, dim, hidden).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).div(dim**0.5).to(dtype)
    return experts


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_one(experts, x_TD, slots):
    return run([(experts, slots)], x_TD)


def mask_of(load, n_experts=3):
    rows = LOADS[load]
    selected_NE = torch.zeros(len(rows), n_experts, dtype=torch.bool)
    for n, row in enumerate(rows):
        for e in row:
            selected_NE[n, int(e)] = True
    return selected_NE


def index_of(n_rows):
    """Rows of the group among the tokens: ascending, not from 0 on."""
    return torch.tensor([1, 2, 4, 5, 6, 7, 9, 10][:n_rows], dtype=torch.int64)


def loop_reference(experts, x_TD, selected_NE, gate_NE, index_N):
    rows = [0 * x_TD[t] for t in range(len(x_TD))]
    for n, t in enumerate(index_N.tolist()):
        for e in range(experts.n_experts):
            if not selected_NE[n, e]:
                continue
            out = torch.zeros(DIM, dtype=x_TD.dtype)
            for f in range(HIDDEN):
                a, b = ((x_TD[t] * experts.w13[e][:, column]).sum() for column in (f, HIDDEN + f))
                out = out + a / (1 + torch.exp(-a)) * b * experts.w2[e][f]
            rows[t] = rows[t] + (out if gate_NE is None else gate_NE[n, e] * out)
    return torch.stack(rows)


def assert_equal_with_gradients(got, expected, wanted, rtol=1e-11, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    weight = draw(*got.shape, seed=9)
    grads = [torch.autograd.grad((v * weight).sum(), wanted, allow_unused=True) for v in (got, expected)]
    for value, g, n in zip(wanted, *grads, strict=True):
        g, n = (torch.zeros_like(value) if v is None else v for v in (g, n))
        torch.testing.assert_close(g, n, rtol=rtol, atol=atol)


# --- slots


@pytest.mark.parametrize("room", [0, 1, 7])
@pytest.mark.parametrize("load", LOADS)
def test_ragged_slots_are_the_pairs_in_order_of_expert_and_token(load, room):
    selected_NE, index_N = mask_of(load), index_of(len(LOADS[load]))
    gate_NE = draw(*selected_NE.shape)
    pairs = [(e, n) for e in range(3) for n in range(len(index_N)) if selected_NE[n, e]]
    bound = len(pairs) + room
    slots = ragged_slots(selected_NE, gate_NE, bound, index_N, N_TOKENS)
    assert slots.token_S.tolist() == [index_N[n].item() for _, n in pairs] + [-1] * room
    assert slots.gate_S.tolist() == [gate_NE[n, e].item() for e, n in pairs] + [0] * room
    assert slots.ends_E.tolist() == [sum(p[0] <= e for p in pairs) for e in range(3)]
    assert (slots.token_S.dtype, slots.slots_TC.dtype, slots.ends_E.dtype) == (torch.int64, torch.int64, torch.int32)
    inverse = torch.full((N_TOKENS, 3), -1)
    for s, (e, n) in enumerate(pairs):
        inverse[index_N[n], e] = s
    assert torch.equal(slots.slots_TC, inverse)
    assert ragged_slots(selected_NE, None, bound, index_N, N_TOKENS).gate_S is None


def test_pairs_beyond_the_bound_are_cut_off():
    selected_NE, index_N = mask_of("everyone"), index_of(8)
    whole = ragged_slots(selected_NE, draw(8, 3), 24, index_N, N_TOKENS)
    slots = ragged_slots(selected_NE, draw(8, 3), 13, index_N, N_TOKENS)
    assert torch.equal(slots.token_S, whole.token_S[:13]) and torch.equal(slots.gate_S, whole.gate_S[:13])
    assert slots.ends_E.tolist() == [8, 13, 13]
    assert torch.equal(slots.slots_TC, torch.where(whole.slots_TC < 13, whole.slots_TC, -1))
    run_one(new_experts(), draw(N_TOKENS, DIM), slots)


def test_rows_nobody_selects_may_repeat_a_token():
    """Padded groups point at token 0 in their invalid slots."""
    selected_NE = torch.tensor([[True, False], [False, True], [False, False], [False, False]])
    slots = ragged_slots(selected_NE, None, 3, torch.tensor([0, 3, 0, 0]), 4)
    assert slots.slots_TC.tolist() == [[0, -1], [-1, -1], [-1, -1], [-1, 1]]
    assert slots.token_S.tolist() == [0, 3, -1]


def test_equal_slots_are_the_given_tokens():
    token_EK = torch.tensor([[0, 2, -1], [2, 3, 4]])
    gate_EK = torch.tensor([[0.1, 0.2, torch.nan], [0.4, 0.5, 0.6]])
    slots = equal_slots(token_EK, gate_EK, 6)
    assert slots.token_S.tolist() == [0, 2, -1, 2, 3, 4] and slots.ends_E is None
    assert torch.equal(slots.gate_S, torch.tensor([0.1, 0.2, 0, 0.4, 0.5, 0.6]))
    assert torch.equal(slots.slots_TC, slots_of_tokens(token_EK, 6))
    assert equal_slots(token_EK, None, 6).gate_S is None


def test_slots_read_nothing_on_the_host():
    """Fake tensors hold no data: a nonzero, an .item() or a mask index would fail."""
    with FakeTensorMode():
        experts = Experts(3, 16, 24)
        selected_NE, gate_NE = torch.empty(9, 3, dtype=torch.bool), torch.empty(9, 3, requires_grad=True)
        x_TD = torch.empty(9, 16, requires_grad=True)
        y_TD = run_one(experts, x_TD, ragged_slots(selected_NE, gate_NE, 14, torch.arange(9), 9))
        y_TD.sum().backward()
        assert y_TD.shape == x_TD.grad.shape == (9, 16) and gate_NE.grad.shape == (9, 3)
        assert experts.w13.grad.shape == (3, 16, 48)


# --- run


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("load", LOADS)
def test_ragged_form_equals_the_loops(load, room, gated):
    experts, selected_NE, index_N = new_experts(), mask_of(load), index_of(len(LOADS[load]))
    x_TD = draw(N_TOKENS, DIM).requires_grad_()
    gate_NE = draw(*selected_NE.shape, seed=2).requires_grad_() if gated else None
    y_TD = run_one(experts, x_TD, ragged_slots(selected_NE, gate_NE, int(selected_NE.sum()) + room, index_N, N_TOKENS))
    expected_TD = loop_reference(experts, x_TD, selected_NE, gate_NE, index_N)
    wanted = [x_TD, experts.w13, experts.w2, *([gate_NE] if gated else [])]
    assert_equal_with_gradients(y_TD, expected_TD, wanted)
    chosen = torch.zeros(N_TOKENS, dtype=torch.bool).index_fill(0, index_N[selected_NE.any(1)], True)
    assert torch.equal(y_TD[~chosen], torch.zeros(int((~chosen).sum()), DIM, dtype=torch.float64))


TAKEN = {
    "full": [[1, 4, 7], [1, 2, 10], [2, 4, 9]],
    "with_empty": [[1, 4, -1], [-1, -1, -1], [2, -1, -1]],
    "single_expert": [[0, 3, 4, -1]],
    "no_slots": [[], [], []],
    "one_token": [[1], [1], [1]],
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", TAKEN)
def test_equal_form_equals_the_loops(case, gated):
    token_EK = torch.tensor(TAKEN[case], dtype=torch.int64)
    experts = new_experts(len(token_EK))
    x_TD = draw(N_TOKENS, DIM).requires_grad_()
    gate_TE = draw(N_TOKENS, len(token_EK), seed=2).requires_grad_() if gated else None
    gate_EK = gate_TE.T.gather(1, token_EK.clamp(min=0)) if gated else None
    selected_TE = torch.zeros(N_TOKENS, len(token_EK), dtype=torch.bool)
    for e, tokens in enumerate(TAKEN[case]):
        selected_TE[[t for t in tokens if t >= 0], e] = True
    y_TD = run_one(experts, x_TD, equal_slots(token_EK, gate_EK, N_TOKENS))
    expected_TD = loop_reference(experts, x_TD, selected_TE, gate_TE, torch.arange(N_TOKENS))
    assert_equal_with_gradients(y_TD, expected_TD, [x_TD, experts.w13, experts.w2, *([gate_TE] if gated else [])])


def test_a_group_of_one_expert_has_one_column():
    """Whole groups without a router: slots straight from the index sets."""
    experts, x_TD = new_experts(1), draw(5, DIM)
    slots = Slots(torch.tensor([1, 3, 4]), None, torch.tensor([-1, 0, -1, 1, 2])[:, None], None)
    y_TD = run_one(experts, x_TD, slots)
    assert torch.equal(y_TD[[1, 3, 4]], experts(x_TD[None, [1, 3, 4]])[0])
    assert not y_TD[[0, 2]].any()


def swiglu_by_bmm(experts, x_EKD, gate_EK):
    def gated(h, gate):
        h1, h3 = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)  # rounded once, at the end
        activation = F.silu(h1) * h3
        return (activation if gate is None else activation * gate[..., None]).to(h.dtype)

    if len(x_EKD) == 1:
        gate_K = None if gate_EK is None else gate_EK[0]
        return (gated(x_EKD[0] @ experts.w13[0], gate_K) @ experts.w2[0])[None]
    return torch.bmm(gated(torch.bmm(x_EKD, experts.w13), gate_EK), experts.w2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TAKEN)
def test_equal_form_is_a_batched_matmul_to_the_bit(case, dtype, autocast):
    token_EK = torch.tensor(TAKEN[case], dtype=torch.int64)
    experts, x_TD = new_experts(len(token_EK), dtype), draw(N_TOKENS, DIM, dtype=dtype).requires_grad_()
    gate_EK = draw(*token_EK.shape, seed=2).sigmoid()
    gate_EK = (gate_EK if dtype == torch.float64 else gate_EK.float()).requires_grad_()
    wanted = [x_TD, gate_EK, experts.w13, experts.w2]
    slots_TC, token_S = slots_of_tokens(token_EK, N_TOKENS), token_EK.reshape(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_EKD = dispatch(cast(x_TD), token_S, slots_TC).view(*token_EK.shape, DIM)
        expected_TD = combine(swiglu_by_bmm(experts, x_EKD, gate_EK).flatten(0, 1), slots_TC, token_S)
        y_TD = run_one(experts, x_TD, equal_slots(token_EK, gate_EK, N_TOKENS))
    assert y_TD.dtype == expected_TD.dtype and torch.equal(y_TD, expected_TD)
    weight = draw(N_TOKENS, DIM, seed=9, dtype=y_TD.dtype)
    got, need = (torch.autograd.grad((v * weight).sum(), wanted) for v in (y_TD, expected_TD))
    assert all(torch.equal(g, n) for g, n in zip(got, need, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_taken_a_few_at_a_time_have_the_same_bits(dtype, gated, monkeypatch):
    experts, x_TD = new_experts(2, dtype), draw(N_TOKENS, DIM, dtype=dtype).requires_grad_()
    token_EK = torch.tensor([[0, 2, 3, 7], [2, 5, 7, 10]])
    gate_EK = draw(2, 4, seed=2).sigmoid().requires_grad_() if gated else None
    outcomes = []
    for part in (64, 3):  # of 8 slots
        monkeypatch.setattr(experts_module, "PART", part)
        y_TD = run_one(experts, x_TD, equal_slots(token_EK, gate_EK, N_TOKENS))
        wanted = [x_TD, experts.w13, experts.w2, *([gate_EK] if gated else [])]
        outcomes.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), wanted)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def equal_loads(n_tokens, n_experts, seed=0):
    """The same choice in both forms: `token_EK` and the mask."""
    generator = torch.Generator().manual_seed(seed)
    k = n_tokens // n_experts
    token_EK = torch.stack([torch.randperm(n_tokens, generator=generator)[:k].sort().values for _ in range(n_experts)])
    return token_EK, torch.zeros(n_tokens, n_experts, dtype=torch.bool).scatter(0, token_EK.T, True)


@pytest.mark.parametrize("n_experts", [1, 2, 4])
def test_both_forms_agree_where_loads_are_equal(n_experts):
    token_EK, selected_TE = equal_loads(20, n_experts)
    experts = new_experts(n_experts)
    x_TD, gate_TE = draw(20, DIM).requires_grad_(), draw(20, n_experts, seed=2).requires_grad_()
    equal_TD = run_one(experts, x_TD, equal_slots(token_EK, gate_TE.T.gather(1, token_EK), 20))
    ragged = ragged_slots(selected_TE, gate_TE, token_EK.numel() + 5, torch.arange(20), 20)
    assert torch.equal(ragged.token_S[:-5], token_EK.flatten())
    assert_equal_with_gradients(
        run_one(experts, x_TD, ragged), equal_TD, [x_TD, gate_TE, experts.w13, experts.w2], rtol=1e-12
    )


@pytest.mark.parametrize("form", ["ragged", "equal"])
def test_garbage_in_unselected_tokens_stays_there(form):
    """NaN in states and gates nobody chose reaches neither another token nor any gradient."""
    experts = new_experts()
    token_EK, selected_TE = equal_loads(9, 3, seed=3)
    token_EK = token_EK.clone()
    token_EK[0, 2], selected_TE[token_EK[0, 2], 0] = -1, False
    alone = ~selected_TE.any(1)
    assert alone.any()
    outcomes = []
    for garbage in (0.0, torch.nan):
        x_TD, gate_TE = draw(9, DIM), draw(9, 3, seed=2)
        x_TD[alone] = garbage
        gate_TE = torch.where(selected_TE, gate_TE, garbage)
        x_TD.requires_grad_(), gate_TE.requires_grad_()
        if form == "equal":
            slots = equal_slots(token_EK, gate_TE.T.gather(1, token_EK % 9), 9)
        else:
            slots = ragged_slots(selected_TE, gate_TE, 12, torch.arange(9), 9)
        y_TD = run_one(experts, x_TD, slots)
        y_TD.square().sum().backward()
        outcomes.append((y_TD, x_TD.grad, gate_TE.grad, experts.w13.grad, experts.w2.grad))
        experts.zero_grad()
    clean, dirty = outcomes
    assert all(torch.equal(c, d) and d.isfinite().all() for c, d in zip(clean, dirty, strict=True))
    assert not dirty[0][alone].any() and not dirty[1][alone].any() and not dirty[2][~selected_TE].any()


def test_repeated_runs_have_the_same_bits():
    experts = new_experts(dtype=torch.float32)
    outcomes = []
    for _ in range(2):
        x_TD, gate_NE = draw(N_TOKENS, DIM, dtype=torch.float32).requires_grad_(), draw(8, 3, dtype=torch.float32)
        y_TD = run_one(experts, x_TD, ragged_slots(mask_of("mixed"), gate_NE, 12, index_of(8), N_TOKENS))
        outcomes.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, experts.w13, experts.w2])))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_activation_checkpointing_changes_nothing():
    experts, x_TD = new_experts(), draw(N_TOKENS, DIM).requires_grad_()
    gate_NE = draw(8, 3, seed=2).requires_grad_()

    def run(x_TD, gate_NE):
        return run_one(experts, x_TD, ragged_slots(mask_of("mixed"), gate_NE, 12, index_of(8), N_TOKENS))

    wanted = [x_TD, gate_NE, experts.w13, experts.w2]
    plain, again = run(x_TD, gate_NE), checkpoint(run, x_TD, gate_NE, use_reentrant=False)
    got, need = (torch.autograd.grad(y.square().sum(), wanted) for y in (again, plain))
    assert torch.equal(again, plain) and all(torch.equal(g, n) for g, n in zip(got, need, strict=True))


# --- grouped matmul

ENDS = {
    "all": [2, 5, 9],
    "tail": [2, 5, 6],
    "empty_first": [0, 4, 7],
    "empty_middle": [3, 3, 9],
    "empty_last": [3, 7, 7],
    "one_has_all": [0, 9, 9],
    "nothing": [0, 0, 0],
}


def ends_of(case):
    return torch.tensor(ENDS[case], dtype=torch.int32)


def grouped_by_loop(x_SD, w_EDF, ends):
    rows, start = [torch.zeros(w_EDF.shape[2], dtype=x_SD.dtype)] * len(x_SD), 0
    for e, end in enumerate(ends):
        for s in range(start, end):
            rows[s] = (x_SD[s][:, None] * w_EDF[e]).sum(0)
        start = end
    return torch.stack(rows)


@pytest.mark.parametrize("case", ENDS)
def test_grouped_matmul_equals_the_loop(case):
    ends_E = ends_of(case)
    x_SD, w_EDF = draw(9, 4).requires_grad_(), draw(3, 4, 5, seed=2).requires_grad_()
    y_SF = grouped_matmul(x_SD, w_EDF, ends_E)
    torch.testing.assert_close(y_SF, grouped_by_loop(x_SD, w_EDF, ENDS[case]), rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, ends_E), (x_SD, w_EDF))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ENDS)
def test_rows_after_the_last_end_are_zero_whatever_they_hold(case, dtype):
    ends_E, last = ends_of(case), ENDS[case][-1]
    x_SD, w_EDF = draw(9, 8, dtype=dtype), draw(3, 8, 16, seed=2, dtype=dtype).requires_grad_()
    grad_SF = draw(9, 16, seed=3, dtype=dtype)
    x_SD[last:], grad_SF[last:] = torch.nan, torch.nan
    x_SD.requires_grad_()
    y_SF = grouped_matmul(x_SD, w_EDF, ends_E)
    dx_SD, dw_EDF = torch.autograd.grad(y_SF, [x_SD, w_EDF], grad_SF)
    assert y_SF.isfinite().all() and dx_SD.isfinite().all() and dw_EDF.isfinite().all()
    assert not y_SF[last:].any() and not dx_SD[last:].any()
    for e, (start, end) in enumerate(zip([0, *ENDS[case]], ENDS[case], strict=False)):
        assert dw_EDF[e].any() == (end > start)


def test_gradients_nobody_asks_for_are_left_out():
    x_SD, w_EDF, ends_E = draw(9, 4), draw(3, 4, 5, seed=2), ends_of("tail")
    with FlopCounterMode(display=False) as counter:
        y_SF = grouped_matmul(x_SD.requires_grad_(), w_EDF, ends_E)
        y_SF.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 4 * 5  # no gradient of the weights
    with FlopCounterMode(display=False) as counter:
        grouped_matmul(x_SD.detach(), w_EDF.requires_grad_(), ends_E).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 4 * 5
    torch.testing.assert_close(w_EDF.grad[0], x_SD[:2].detach().sum(0)[:, None].expand(4, 5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_count_every_slot(device):
    with torch.device(device):
        experts = Experts(3, 16, 24)
        for parameter in experts.parameters():
            nn.init.zeros_(parameter)
        x_TD = torch.zeros(9, 16, requires_grad=True)
        slots = ragged_slots(torch.ones(9, 3, dtype=torch.bool), torch.ones(9, 3), 30, torch.arange(9), 9)
        with FlopCounterMode(display=False) as counter:
            y_TD = run_one(experts, x_TD, slots)
        assert counter.get_total_flops() == 2 * 30 * 16 * 24 * 3
        with FlopCounterMode(display=False) as counter:
            y_TD.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 30 * 16 * 24 * 3


@pytest.mark.parametrize("op", ["matmul", "outer"])
def test_operators_are_registered_properly(op):
    """torch's own checks of schema, fake implementation, autograd and tracing with dynamic shapes."""
    x_SD, ends_E = draw(9, 4).requires_grad_(), ends_of("tail")
    if op == "matmul":
        torch.library.opcheck(torch.ops.moma.grouped_matmul, (x_SD, draw(3, 4, 5).requires_grad_(), ends_E))
    else:
        torch.library.opcheck(torch.ops.moma.grouped_outer, (x_SD.detach(), draw(9, 5), ends_E))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_casts_as_bmm_does(dtype, enabled):
    x_SD, w_EDF, ends_E = draw(9, 8, dtype=dtype), draw(3, 8, 16, seed=2, dtype=dtype), ends_of("all")
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y_SF, like = grouped_matmul(x_SD, w_EDF, ends_E), torch.bmm(x_SD.view(3, 3, 8), w_EDF)
    assert y_SF.dtype == like.dtype


def test_bf16_autocast_stays_close_to_fp32():
    experts = new_experts(4, torch.float32, 16, 24)
    x_TD = draw(40, 16, dtype=torch.float32).requires_grad_()
    gate_TE = draw(40, 4, seed=2, dtype=torch.float32).sigmoid().requires_grad_()
    selected_TE = draw(40, 4, seed=3) > 0.3
    wanted = [x_TD, gate_TE, experts.w13, experts.w2]
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y_TD = run_one(experts, x_TD, ragged_slots(selected_TE, gate_TE, 160, torch.arange(40), 40))
        assert y_TD.dtype == (torch.bfloat16 if enabled else torch.float32)
        values.append((y_TD.float(), *torch.autograd.grad(y_TD.float().sum(), wanted)))
    for exact, low in zip(*values, strict=True):
        assert low.dtype == torch.float32 and low.isfinite().all()
        assert (low - exact).norm() <= 0.02 * exact.norm()


# --- the kernel that CUDA takes, here on torch's CPU implementation of it


def poisoned(monkeypatch):
    """`grouped_mm` as a GPU may return it: NaN wherever it writes nothing."""
    real = F.grouped_mm

    def grouped_mm(a, b, offs):
        out = real(a, b, offs=offs)
        if b.dim() == 3:
            out[offs[-1] :] = torch.nan
        else:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(module.F, "grouped_mm", grouped_mm)


@pytest.mark.parametrize("case", ENDS)
def test_kernel_equals_the_loop(monkeypatch, case):
    poisoned(monkeypatch)
    ends_E = ends_of(case)
    x_SD, y_SF = draw(9, 8, dtype=torch.bfloat16), draw(9, 16, seed=2, dtype=torch.bfloat16)
    w_EDF = draw(3, 8, 16, seed=3, dtype=torch.bfloat16)
    close = {"rtol": 0.02, "atol": 0.02}
    loop = torch.ops.moma.grouped_matmul
    torch.testing.assert_close(module._kernel_matmul(x_SD, w_EDF, ends_E), loop(x_SD, w_EDF, ends_E), **close)
    torch.testing.assert_close(module._kernel_matmul(y_SF, w_EDF.mT, ends_E), loop(y_SF, w_EDF.mT, ends_E), **close)
    outer = torch.ops.moma.grouped_outer(x_SD, y_SF, ends_E)
    torch.testing.assert_close(module._kernel_outer(x_SD, y_SF, ends_E), outer, **close)
    expanded_SF = torch.ones((), dtype=torch.bfloat16).expand(9, 16)  # what a sum's backward hands over
    outer = torch.ops.moma.grouped_outer(x_SD, expanded_SF, ends_E)
    torch.testing.assert_close(module._kernel_outer(x_SD, expanded_SF, ends_E), outer, **close)


def test_kernel_is_for_aligned_bf16_on_cuda():
    with FakeTensorMode():
        x_SD = torch.empty(9, 16, device="cuda", dtype=torch.bfloat16)
        assert module._has_kernel(x_SD, 24)
        assert not module._has_kernel(x_SD, 20)
        assert not module._has_kernel(x_SD.new_empty(9, 12), 24)
        assert not module._has_kernel(x_SD.new_empty(0, 16), 24)
        assert not module._has_kernel(x_SD.new_empty(9, 16, dtype=torch.float32), 24)
        assert not module._has_kernel(torch.empty(9, 16, dtype=torch.bfloat16), 24)


def test_kernel_accepts_the_layouts_and_reads_nothing_on_the_host():
    """`grouped_mm` checks strides on fake tensors too; these hold no data that could be read."""
    with FakeTensorMode():
        x_SD, w_EDF = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((9, 16), (3, 16, 24)))
        ends_E = torch.empty(3, dtype=torch.int32)
        y_SF = module._kernel_matmul(x_SD, w_EDF, ends_E)
        assert y_SF.shape == (9, 24) and y_SF.is_contiguous()
        assert module._kernel_matmul(y_SF, w_EDF.mT, ends_E).shape == x_SD.shape
        assert module._kernel_outer(x_SD, y_SF, ends_E).shape == w_EDF.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ENDS)
def test_gpu_equals_the_cpu(case):
    given = [draw(9, 16), draw(3, 16, 24, seed=2), draw(9, 24, seed=3)]
    outcomes = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.bfloat16)):
        x_SD, w_EDF, grad_SF = (t.to(device, dtype, copy=True) for t in given)
        y_SF = grouped_matmul(x_SD.requires_grad_(), w_EDF.requires_grad_(), ends_of(case).to(device))
        outcomes.append([t.cpu().double() for t in (y_SF, *torch.autograd.grad(y_SF, [x_SD, w_EDF], grad_SF))])
    for cpu, wide, low in zip(*outcomes, strict=True):
        torch.testing.assert_close(wide, cpu, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(low, cpu, rtol=0.03, atol=0.1)
        assert torch.equal(low == 0, cpu == 0)  # rows of the tail, experts without rows


# --- compilation


def compiled_run(experts, backend):
    def run(x_TD, gate_NE, selected_NE):
        return run_one(experts, x_TD, ragged_slots(selected_NE, gate_NE, 26, index_of(8), N_TOKENS))

    torch._dynamo.reset()
    return run, torch.compile(run, fullgraph=True, backend=backend)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_serves_all_loads(autocast):
    experts = new_experts(dtype=torch.float32)
    run, compiled = compiled_run(experts, "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for load in ("mixed", "nobody", "everyone", "empty_middle", "one_has_all"):
            x_TD = draw(N_TOKENS, DIM, dtype=torch.float32).requires_grad_()
            gate_NE = draw(8, 3, seed=2, dtype=torch.float32).requires_grad_()
            wanted = [x_TD, gate_NE, experts.w13, experts.w2]
            both = [f(x_TD, gate_NE, mask_of(load)) for f in (compiled, run)]
            got, need = (torch.autograd.grad(y.float().square().sum(), wanted) for y in both)
            assert torch.equal(*both)
            assert all(torch.equal(g, n) for g, n in zip(got, need, strict=True))


def test_equal_form_compiles_to_one_graph():
    experts, token_EK = new_experts(), torch.tensor(TAKEN["with_empty"])

    def run(x_TD, gate_EK, token_EK):
        return run_one(experts, x_TD, equal_slots(token_EK, gate_EK, N_TOKENS))

    torch._dynamo.reset()
    args = draw(N_TOKENS, DIM).requires_grad_(), draw(3, 3, seed=2).requires_grad_(), token_EK
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*args), run(*args))


def test_inductor_agrees():
    experts = new_experts()
    run, compiled = compiled_run(experts, "inductor")
    x_TD, gate_NE = draw(N_TOKENS, DIM).requires_grad_(), draw(8, 3, seed=2).requires_grad_()
    wanted = [x_TD, gate_NE, experts.w13, experts.w2]
    for load in ("mixed", "empty_middle"):
        both = [f(x_TD, gate_NE, mask_of(load)) for f in (compiled, run)]
        assert_equal_with_gradients(*both, wanted)
