"""Routers on held-out tokens: agreement, ties, maps and diagnostics equal loops over tokens and experts."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from moma.data.batch import Batch
from moma.evaluation.decisions import decide
from moma.evaluation.diagnostics import specialisation, token_information
from moma.evaluation.perplexity import perplexity
from moma.evaluation.routing import agreement, routing, ties_of
from moma.modality import modality_of
from moma.model.depth import DepthBlock
from moma.model.feed_forward import AUX_MODES
from moma.model.routing.token_choice import TokenChoiceConfig


@pytest.fixture
def batches(make_batch):
    def make(variant, seeds=(0, 1)):
        found = []
        for seed in seeds:
            b = make_batch(variant.vocabulary, seed)
            found.append(
                Batch(seed, b.tokens_RL, b.target_RL, b.document_RL, b.position_RL, b.groups, 1, b.groups.valid is None)
            )
        return found

    return make


def trained(make_model, variant, **fields):
    """A model with cut-offs of its own, as after some steps."""
    model = make_model(variant, seed=3, aux_routers=variant.sees_future, **fields)
    generator = torch.Generator().manual_seed(5)
    for name, value in model.named_buffers():
        if name.endswith("cutoff"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        elif name.endswith("age"):
            value.fill_(10)
    return model.requires_grad_(False)


def test_agreement_equals_a_loop_over_pairs(variant, make_model, batches):
    model, data = trained(make_model, variant), batches(variant)
    for mode in ("train", *model.causal_modes()):
        decisions = decide(model, data, variant.vocabulary, mode)
        found = agreement(model, decisions)
        needy = {n for n, r in model.routers().items() if isinstance(r, DepthBlock) or r.needs_future}
        assert found.keys() == needy and bool(needy) == variant.sees_future
        for name, rules in found.items():
            assert rules.keys() == (set(model.causal_modes()) if mode == "train" else {mode})
            state = model.routers()[name].routing_state()
            for rule, entry in rules.items():
                pairs, n_tokens, ties = [], 0, 0
                values = "aux_logit_TE" if rule in AUX_MODES else "score_TE"
                for s in decisions.routers[name]:
                    n_tokens += int(s.member_TE.any(1).sum())
                    for e in range(s.member_TE.shape[1]):
                        own = [t for t in range(len(s.member_TE)) if s.member_TE[t, e]]
                        main, true_T = s.score_TE[:, e].tolist(), s.reference_TE[:, e].tolist()
                        sides = {(main[t], true_T[t]) for t in own}
                        for t in own:
                            score, true = getattr(s, values)[t, e].item(), true_T[t]
                            if mode != "train":
                                said = bool(s.selected_TE[t, e])
                            elif rule == "threshold":
                                said = math.log(score / (1 - score)) > state["cutoff"][e].item()
                            else:
                                said = score > (state["aux_cutoff"][e].item() if rule == "aux_calibrated" else 0)
                            pairs.append((said, true, score))
                            ties += (main[t], not true) in sides
                n, hits = len(pairs), sum(said and true for said, true, _ in pairs)
                share = sum(true for _, true, _ in pairs) / n
                score = torch.tensor([p[2] for p in pairs], dtype=torch.float64)
                label = torch.tensor([p[1] for p in pairs])
                over, under = score[label][:, None], score[~label]
                wins = ((over > under).double() + 0.5 * (over == under)).mean().item()
                assert entry == pytest.approx({
                    "accuracy": sum(said == true for said, true, _ in pairs) / n,
                    "majority": max(share, 1 - share),
                    "auc": wins,
                    "precision": hits / max(1, sum(said for said, _, _ in pairs)),
                    "recall": hits / max(1, sum(true for _, true, _ in pairs)),
                    "experts_true": sum(true for _, true, _ in pairs) / n_tokens,
                    "experts_predicted": sum(said for said, _, _ in pairs) / n_tokens,
                    "tie_share": ties / n,
                })  # fmt: skip


def test_a_free_running_decision_on_the_first_layer_is_the_one_on_training_states(variants, make_model, batches):
    """Nothing is routed before layer 0, so its states are the same in every mode."""
    for name in ("moe_4t4i", "mod_4t4i"):
        variant = variants[name]
        model, data = trained(make_model, variant), batches(variant)
        first = "0.depth" if name == "mod_4t4i" else "0"
        train = routing(model, data, variant.vocabulary, "train")["agreement"]
        for mode in model.causal_modes():
            free = routing(model, data, variant.vocabulary, mode)["agreement"]
            assert free[first][mode] == pytest.approx(train[first][mode])


def test_ties_are_counted_on_both_sides_of_the_cut_alone():
    score = torch.tensor([[0.9, 0.5], [0.5, 0.5], [0.5, 0.4], [0.5, 0.0], [0.1, 0.5]])
    true = torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.bool)
    member = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0], [1, 1]], dtype=torch.bool)
    stats = SimpleNamespace(score_TE=score, reference_TE=true, member_TE=member)
    # expert 0: tokens 1 and 2 (3 is not its); expert 1: 0, 1 and 4
    assert ties_of(stats) == 5  # type: ignore[arg-type]


def test_identical_tokens_tie(variants, make_model, rebuild):
    """Every BOS under a document mask has the same state."""
    variant = variants["moe_8x"]
    vocab = variant.vocabulary
    b = rebuild(torch.full((8, 4), 30), torch.arange(4).expand(8, 4), vocab)  # one token per document: all the same
    data = [Batch(0, b.tokens_RL, b.target_RL, b.document_RL, b.position_RL, b.groups, 1, True)]
    model = trained(make_model, variant)
    found = routing(model, data, vocab, "train")["agreement"]["0"]
    assert {entry["tie_share"] for entry in found.values()} == {1.0}
    assert {entry["auc"] for entry in found.values()} == {0.5}


def test_maps_and_diagnostics_equal_loops(variant, make_model, batches):
    model, data, vocab = trained(make_model, variant), batches(variant), variant.vocabulary
    if not model.routers():
        assert routing(model, data, vocab, "train") == {}
        return
    for mode in ("train", "threshold"):
        decisions = decide(model, data, vocab, mode)
        found = routing(model, data, vocab, mode)
        assert found["maps"].keys() == found["diagnostics"].keys() == model.routers().keys()
        kinds = torch.cat([modality_of(b.tokens_RL.flatten(), vocab) for b in data]).tolist()
        for name in model.routers():
            chosen, member = decisions.joined(name, "selected_TE"), decisions.joined(name, "member_TE")
            columns = range(chosen.shape[1])
            maps, own = found["maps"][name], found["diagnostics"][name]
            assert len(maps["columns"]) == len(set(maps["columns"])) == len(maps["expected"]) == len(columns)
            for m, modality in enumerate(vocab.modalities):
                every = [t for t, kind in enumerate(kinds) if kind == m]
                for e in columns:
                    assert maps["share"][e][m] == pytest.approx(sum(chosen[t, e].item() for t in every) / len(every))
                mine = [t for t in every if member[t].any()]
                assert (modality in own) == bool(mine)
                if not mine:
                    continue
                picks = [int(chosen[t].sum()) for t in mine]
                entry = own[modality]
                for what, wanted in (("none", {0}), ("one", {1}), ("several", set(range(2, 99)))):
                    assert entry[what] == pytest.approx(sum(p in wanted for p in picks) / len(mine))
                load = [sum(chosen[t, e].item() for t in mine) for e in columns]
                assert entry["load"] == pytest.approx([n / len(mine) for n in load])
                n_open = sum(bool(member[mine, e].any()) for e in columns)
                if n_open == 1 or not sum(load):
                    assert entry["load_entropy"] is None
                else:
                    shares = [n / sum(load) for n in load if n]
                    entropy = -sum(p * math.log(p) for p in shares) / math.log(n_open)
                    assert entry["load_entropy"] == pytest.approx(entropy, abs=1e-6)
                assert ("token_information" in entry) == (modality == "text")


def test_names_and_expected_shares_of_columns(variants, make_model, batches):
    def columns(name, router):
        variant = variants[name]
        maps = routing(trained(make_model, variant), batches(variant), variant.vocabulary, "train")["maps"]
        return maps[router]["columns"], maps[router]["expected"]

    assert columns("moe_7t1i", "1") == ([f"text {e}" for e in range(7)], [pytest.approx(1 / 7)] * 7)
    assert columns("moe_8x", "0") == ([f"mixed {e}" for e in range(8)], [1 / 8] * 8)
    assert columns("token_choice_4x", "0")[1] == [1 / 2] * 4
    assert columns("mod_4t4i", "0.depth") == (["depth"], [0.5])
    assert columns("mod_quota_untied", "0.depth") == (["depth text", "depth image"], [0.5, 0.5])


def test_dropped_choices_are_of_the_training_rule_alone(variants, make_model, batches):
    variant = variants["token_choice_4x"]
    tight = TokenChoiceConfig(k=2, capacity_factor=0.5)
    variant = type(variant)(type(variant.feed_forward)({"all": 4}, selection=tight), variant.vocabulary)
    model, data = trained(make_model, variant), batches(variant)
    train = routing(model, data, variant.vocabulary, "train")["diagnostics"]["0"]["text"]
    free = routing(model, data, variant.vocabulary, "threshold")["diagnostics"]["0"]["text"]
    assert 0.3 < train["dropped"] < 1 and "dropped" not in free
    assert train["none"] > 0 and free["several"] == 1.0


def test_rules_that_draw_in_evaluation_draw_the_same_every_time(variants, make_model, batches):
    variant = variants["token_choice_4x"]
    drawn = TokenChoiceConfig(k=2, second_choice="gumbel_always")
    variant = type(variant)(type(variant.feed_forward)({"all": 4}, selection=drawn), variant.vocabulary)
    model, data, vocab = trained(make_model, variant), batches(variant), variant.vocabulary
    train = perplexity(model, data, vocab, "train")
    assert train == perplexity(model, data, vocab, "train")
    assert train["loss"] != perplexity(model, data, vocab, "threshold")["loss"]
    renumbered = [Batch(b.number + 7, *list(vars(b).values())[1:]) for b in data]
    assert train["loss"] != perplexity(model, renumbered, vocab, "train")["loss"]


def test_token_information_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (300,), generator=generator)
    ids[:10] = 9  # too rare to count
    chosen = torch.stack(
        [ids % 2 == 0, torch.rand(300, generator=generator) < 0.3, torch.ones(300, dtype=torch.bool)], 1
    )
    found = token_information(ids, chosen)
    kept = [t for t in range(300) if (ids == ids[t]).sum() >= 20]
    assert len(kept) == 290

    def h(q):
        return -sum(p * math.log(p) for p in (q, 1 - q) if p)

    values, chance = [], []
    for e in (0, 1):  # the third takes all: left out
        whole = h(sum(chosen[t, e].item() for t in kept) / len(kept))
        count = Counter(ids[t].item() for t in kept)
        rest = sum(
            n / len(kept) * h(sum(chosen[t, e].item() for t in kept if ids[t] == v) / n) for v, n in count.items()
        )
        values.append((whole - rest) / whole)
        chance.append((len(count) - 1) / (2 * len(kept) * whole))
    assert values[0] == pytest.approx(1) and values[1] < 0.1
    assert found["token_information"] == pytest.approx(sum(values) / 2)
    assert found["token_information_by_chance"] == pytest.approx(sum(chance) / 2)
    assert token_information(ids[:10], chosen[:10])["token_information"] is None
    assert token_information(ids, chosen[:, 2:])["token_information"] is None


def test_specialisation_is_one_for_copies_and_small_for_strangers(variants, make_model):
    model = make_model(variants["moe_7t1i"], seed=0)
    strangers = specialisation(model)
    assert strangers.keys() == {"0", "1"} and strangers["0"].keys() == {"text"}
    w = [model.routers()["0"].experts[0].get_parameter(n).detach() for n in ("w13", "w2")]
    flat = [torch.cat([p[e].flatten() for p in w]) for e in range(7)]
    pairs = [(a @ b / (a.norm() * b.norm())).item() for i, a in enumerate(flat) for b in flat[:i]]
    assert strangers["0"]["text"] == pytest.approx(sum(pairs) / len(pairs)) and abs(strangers["0"]["text"]) < 0.1
    for p in w:
        p.copy_(p[:1].expand_as(p).clone())
    assert specialisation(model)["0"]["text"] == pytest.approx(1.0)
    assert specialisation(make_model(variants["mod_dense"])) == {}
