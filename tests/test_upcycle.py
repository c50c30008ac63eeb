"""Upcycling: what the copies answer, what `moma train` makes of the folder, what is refused."""

import dataclasses
import json
import math
import shlex

import pytest
import torch

from moma import checkpoint, train
from moma.config import compose
from moma.data.shards import open_corpus
from moma.data.synthetic import write_synthetic
from moma.model.attention import SharedAttentionConfig, UntiedAttentionConfig
from moma.model.depth import DepthConfig
from moma.model.feed_forward import DenseConfig, SparseConfig
from moma.model.loss import linear_cross_entropy
from moma.model.routing.threshold import ThresholdConfig
from moma.model.routing.token_choice import TokenChoiceConfig
from moma.objectives import NextTokenConfig, is_aux, next_token
from moma.upcycle import (
    as_target,
    copy_seed,
    expected_equality,
    main,
    source_of,
    target_settings,
    train_command,
    upcycle,
    upcycled_run_dir,
)

EIGHT, FOUR_FOUR, ONE_ONE = {"all": 8}, {"text": 4, "image": 4}, {"text": 1, "image": 1}


# ---- in memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(make_model, variants):
    """`pair(seed, target, noise=0, attention=..., depth=..., **fields)`: a seed and what upcycling makes of it."""

    def make(seed, target, noise=0.0, attention=None, depth=None, **fields):
        base = variants["dense"] if depth is None else dataclasses.replace(variants["dense"], depth=depth)
        old = make_model(dataclasses.replace(base, feed_forward=seed), seed=1, **fields)
        untied = UntiedAttentionConfig() if attention == "untied" else SharedAttentionConfig()
        new = make_model(dataclasses.replace(base, feed_forward=target, attention=untied), seed=2, **fields)
        copy_seed(new, old.state_dict(), noise, seed=3)
        return old, new

    return make


def hidden(model, batch):
    return model(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups)


def loss(model, batch):
    states, _ = hidden(model, batch)
    target_T = batch.target_RL.flatten()
    n = int((target_T >= 0).sum())
    return linear_cross_entropy(
        states.flatten(0, 1), model.head.weight, target_T, denominator=n, z_weight=0.0
    ).objective


@pytest.mark.parametrize(
    ("seed", "target"),
    [
        (DenseConfig(), SparseConfig(EIGHT)),
        (DenseConfig(), SparseConfig(FOUR_FOUR)),
        (DenseConfig(), SparseConfig({"text": 7, "image": 1})),
        (DenseConfig(), SparseConfig(FOUR_FOUR, selection=ThresholdConfig())),
        (DenseConfig(), SparseConfig(FOUR_FOUR, selection=TokenChoiceConfig(k=2, capacity_factor=0.5))),
        (SparseConfig(ONE_ONE), SparseConfig(FOUR_FOUR)),
        (SparseConfig(ONE_ONE), SparseConfig({"text": 1, "image": 3})),
    ],
)
def test_a_token_that_an_expert_computes_keeps_the_seeds_update(pair, make_batch, vocabulary, seed, target):
    """The norm after the layer undoes the gates of identical experts; eps = 0, the seed's own inputs."""
    old, new = pair(seed, target, norm_eps=0.0)
    batch, given = make_batch(vocabulary, 0), []
    for block in old.blocks:
        block.feed_forward.register_forward_hook(lambda module, inputs, output: given.append((inputs[0], output[0])))
    with torch.no_grad():
        hidden(old, batch)
        for block, (x_TD, y_TD) in zip(new.blocks, given, strict=True):
            got_TD, stats = block.feed_forward(x_TD, batch.groups, "train")
            served_T = stats.selected_TE.any(1) | ~stats.member_TE.any(1)
            assert 10 < served_T.sum() < len(served_T) or isinstance(target.selection, ThresholdConfig)
            norm = block.feed_forward_norm
            torch.testing.assert_close(norm(got_TD[served_T]), norm(y_TD[served_T]), rtol=1e-12, atol=1e-12)
            assert not got_TD[~served_T].any()


EXACT = {
    "all, k=1": (DenseConfig(), SparseConfig(EIGHT, selection=TokenChoiceConfig(k=1, weights="renormalised")), {}),
    "all, k=2": (DenseConfig(), SparseConfig(EIGHT, selection=TokenChoiceConfig(k=2, weights="renormalised")), {}),
    "k=1": (DenseConfig(), SparseConfig(FOUR_FOUR, selection=TokenChoiceConfig(k=1, weights="renormalised")), {}),
    "k=2": (
        SparseConfig(ONE_ONE),
        SparseConfig(FOUR_FOUR, selection=TokenChoiceConfig(k=2, scores="sigmoid", weights="renormalised")),
        {},
    ),
    "pre-norm": (
        DenseConfig(),
        SparseConfig(EIGHT, selection=TokenChoiceConfig(k=2, weights="renormalised")),
        {"norm_order": "pre"},
    ),
    "interval": (
        DenseConfig(),
        SparseConfig({"all": (4, 2)}, layers=(0, 2), selection=TokenChoiceConfig(k=2, weights="renormalised")),
        {"n_layers": 4},
    ),
    "1t1i": (DenseConfig(), SparseConfig(ONE_ONE), {}),
    "untied": (DenseConfig(), DenseConfig(), {"attention": "untied"}),
    "untied per head": (
        SparseConfig(ONE_ONE),
        SparseConfig(FOUR_FOUR, selection=TokenChoiceConfig(k=2, weights="renormalised")),
        {"attention": "untied", "qk_norm": "per_head", "n_heads": 4, "n_kv_heads": 2},
    ),
    "depth": (
        DenseConfig(),
        SparseConfig(FOUR_FOUR, selection=TokenChoiceConfig(k=2, weights="renormalised")),
        {"depth": DepthConfig(capacity=0.5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_copies_whose_weights_sum_to_1_are_the_seed(pair, make_batch, vocabulary, case):
    seed, target, fields = EXACT[case]
    old, new = pair(seed, target, **fields)
    batch = make_batch(vocabulary, 0)
    with torch.no_grad():
        logits = [hidden(model, batch)[0] @ model.head.weight.T for model in (old, new)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
    assert expected_equality(new.architecture, ("text", "image"), 0.0)[0]


def test_every_tensor_of_the_seed_arrives_and_only_routers_are_new(pair):
    old, new = pair(SparseConfig(ONE_ONE), SparseConfig(FOUR_FOUR), attention="untied", depth=DepthConfig())
    names = old.state_dict().keys()
    sources = {name: source_of(name, names) for name in new.state_dict()}
    assert set(sources.values()) == {*names, None}
    assert {n for n, source in sources.items() if source is None} == {
        f"blocks.{layer}.feed_forward.{what}"
        for layer in (0, 1)
        for what in ("router", "routing_cutoff", "routing_age")
    }
    assert torch.equal(old.blocks[0].depth_router, new.blocks[0].depth_router)
    with pytest.raises(KeyError, match="no tensor of the seed for blocks.0.extra"):
        source_of("blocks.0.extra", names)


def test_fresh_routers_are_those_of_a_run_from_scratch(make_model, variants, pair):
    _, new = pair(DenseConfig(), SparseConfig(FOUR_FOUR))
    scratch = make_model(variants["moe_4t4i"], seed=2)
    for name, tensor in scratch.state_dict().items():
        if "router" in name or "routing" in name:
            assert torch.equal(new.state_dict()[name], tensor)


def test_experts_have_memory_of_their_own(pair, make_batch, vocabulary):
    old, new = pair(DenseConfig(), SparseConfig(FOUR_FOUR))
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    stack = new.blocks[0].feed_forward.experts[0].w13
    assert all(torch.equal(stack[0], stack[e]) for e in range(4))
    with torch.no_grad():
        stack[1].add_(1.0)
    assert torch.equal(stack[0], before["blocks.0.feed_forward.experts.0.w13"][0]) and torch.equal(stack[0], stack[2])
    optimizer = torch.optim.SGD(new.parameters(), lr=1.0)
    loss(new, make_batch(vocabulary, 0)).backward()
    optimizer.step()
    w2 = new.blocks[0].feed_forward.experts[1].w2
    assert len({tuple(w2[e].flatten().tolist()) for e in range(4)}) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


def router_gradient(model, batch):
    model.zero_grad()
    loss(model, batch).backward()
    return math.hypot(*(block.feed_forward.router.grad.norm().item() for block in model.blocks))


def test_identical_experts_leave_the_router_without_gradient(pair, make_model, make_batch, variants, vocabulary):
    """Swin order, as the paper has it; the ratio to a model from scratch is that of eps to the outputs' size."""
    batch = make_batch(vocabulary, 0)
    _, new = pair(DenseConfig(), SparseConfig(FOUR_FOUR), norm_eps=1e-12)
    scratch = make_model(variants["moe_4t4i"], seed=2, norm_eps=1e-12)
    assert router_gradient(new, batch) < 1e-4 * router_gradient(scratch, batch)
    _, pre = pair(DenseConfig(), SparseConfig(FOUR_FOUR), norm_order="pre")
    scratch = make_model(variants["moe_4t4i"], seed=2, norm_order="pre")
    assert router_gradient(pre, batch) > 0.1 * router_gradient(scratch, batch)


def test_copy_noise_spares_the_first_expert_and_follows_its_seed(make_model, variants, pair):
    old, new = pair(DenseConfig(), SparseConfig(FOUR_FOUR), noise=0.1, dim=64, hidden_dim=128)
    again, other = (make_model(variants["moe_4t4i"], seed=9, dim=64, hidden_dim=128) for _ in range(2))
    copy_seed(again, old.state_dict(), 0.1, seed=3)
    copy_seed(other, old.state_dict(), 0.1, seed=4)
    for group in (0, 1):
        for leaf in ("w13", "w2"):
            name = f"blocks.0.feed_forward.experts.{group}.{leaf}"
            source = old.state_dict()[f"blocks.0.feed_forward.experts.0.{leaf}"][0]
            stack = new.state_dict()[name]
            assert torch.equal(stack[0], source)
            for e in (1, 2, 3):
                assert float((stack[e] - source).std() / source.std()) == pytest.approx(0.1, rel=0.05)
            assert not torch.equal(stack[1], stack[2])
            assert torch.equal(again.state_dict()[name], stack) and not torch.equal(other.state_dict()[name], stack)
    assert torch.equal(new.head.weight, old.head.weight)


@pytest.mark.parametrize(
    ("target", "fields", "noise", "words"),
    [
        (SparseConfig(EIGHT), {}, 0.0, "one that no expert computes loses it"),
        (SparseConfig(EIGHT, selection=ThresholdConfig()), {}, 0.0, "one that no expert computes loses it"),
        (SparseConfig(EIGHT, selection=TokenChoiceConfig()), {}, 0.0, "up to the norms' eps: every token gets a copy"),
        (SparseConfig(EIGHT, selection=TokenChoiceConfig()), {"norm_order": "pre"}, 0.0, "gates scale every update"),
        (
            SparseConfig(EIGHT, selection=TokenChoiceConfig(weights="renormalised", capacity_factor=1.0)),
            {"norm_order": "pre"},
            0.0,
            "exact up to rounding only if the capacity leaves every token an expert",
        ),
        (
            SparseConfig(EIGHT, selection=TokenChoiceConfig(weights="renormalised")),
            {},
            0.1,
            "copy_noise disturbs every expert but a group's first",
        ),
    ],
)
def test_where_equality_is_not_expected_the_reason_is_given(pair, target, fields, noise, words):
    _, new = pair(DenseConfig(), target, **fields)
    exact, said = expected_equality(new.architecture, ("text", "image"), noise)
    assert not exact and words in said


# ---- run folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tokenizer, corpus, _ = write_synthetic(folder, pairs=60, texts=60)
    return tokenizer, corpus


def arguments(made, run_dir, *overrides):
    tokenizer, corpus = made
    return [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}",
        "data.rows=2", "data.row_length=64", "data.images=3",
        "model.dim=32", "model.n_layers=2", "model.n_heads=2", "optim.lr=1e-2", "log.interval=1",
        "eval.interval=null", "duration={steps:6}", "precision=fp32", *overrides,
    ]  # fmt: skip


def trained(made, run_dir, *overrides):
    assert train.main(compose("train", arguments(made, run_dir, *overrides))) == 0
    return run_dir


def upcycling(made, run_dir, seed_run, *overrides):
    return compose("upcycle", arguments(made, run_dir, f"seed_run={seed_run}", "report_batches=2", *overrides))


def upcycled(made, run_dir, seed_run, *overrides):
    upcycle(upcycling(made, run_dir, seed_run, *overrides).config, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def dense(made, tmp_path_factory):
    return trained(made, tmp_path_factory.mktemp("seeds") / "dense", "feed_forward=dense")


@pytest.fixture(scope="module")
def one_one(made, tmp_path_factory):
    return trained(made, tmp_path_factory.mktemp("seeds") / "1t1i", "feed_forward=moe_1t1i")


DEPTH = ("depth=mod", "depth.capacity=0.5", "objective.aux_weight=0.1")


@pytest.fixture(scope="module")
def depth(made, tmp_path_factory):
    """Mixture of depths whose auxiliary routers were trained along."""
    return trained(made, tmp_path_factory.mktemp("seeds") / "mod", "feed_forward=dense", *DEPTH)


def newest(run_dir):
    return checkpoint.latest(run_dir / "checkpoints")


def meta(run_dir):
    return checkpoint.read_meta(newest(run_dir))


def tensors(run_dir, group="model"):
    return checkpoint.read_tensors(newest(run_dir), group)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_train_goes_on_from_the_folder(made, dense, tmp_path, monkeypatch):
    """Step and learning rate start over, the data go on where the seed stopped."""
    run = upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i")
    start = meta(run)
    assert start["step"] == 0 and start["data"] == meta(dense)["data"] and start["data"]["number"] == 6
    assert start["meter"]["tokens"] == 0 and start["upcycled"] == {
        "seed_run": str(dense), "seed_step": 6, "seed_tokens": 768, "seed_flops": meta(dense)["meter"]["flops"],
        "optimizer": "reset", "copy_noise": 0.0,
    }  # fmt: skip
    consumed = []

    def recorded(config, model, batch, *rest):
        consumed.append(batch.number)
        return next_token(config, model, batch, *rest)

    monkeypatch.setattr(train, "OBJECTIVES", {"next_token": (NextTokenConfig, recorded)})
    trained(made, run, "feed_forward=moe_4t4i")
    assert consumed == [6, 7, 8, 9, 10, 11]
    scratch = trained(made, tmp_path / "scratch", "feed_forward=moe_4t4i")
    assert consumed[6:] == [0, 1, 2, 3, 4, 5]
    for name in ("step", "lr", "tokens", "flops"):
        assert [line[name] for line in lines(run)] == [line[name] for line in lines(scratch)]
    end = meta(run)
    assert end["step"] == 6 and end["data"]["number"] == 12 and end["upcycled"] == start["upcycled"]
    assert start.keys() == meta(scratch).keys() and end["config"].keys() == meta(scratch)["config"].keys()


def test_the_identity_is_that_of_train(made, dense, tmp_path):
    run = upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i", "seed.init=5")
    with pytest.raises(ValueError, match=r"not the one of .*run \(feed_forward.experts.all: absent -> 8"):
        trained(made, run, "feed_forward=moe_8x", "seed.init=5")
    with pytest.raises(ValueError, match=r"not the one of .*run \(seed.init: 5 -> 0\)"):
        trained(made, run, "feed_forward=moe_4t4i")
    with pytest.raises(ValueError, match=r"not the one of .*run \(optim.lr: 0.01 -> 0.02\)"):
        trained(made, run, "feed_forward=moe_4t4i", "seed.init=5", "optim.lr=2e-2")
    trained(made, run, "feed_forward=moe_4t4i", "seed.init=5", "log.interval=2")


def test_the_precision_is_the_seeds_unless_given(made, tmp_path):
    seed = trained(made, tmp_path / "seed", "feed_forward=dense", "precision=bf16", "duration={steps:1}")
    given = upcycled(made, tmp_path / "given", seed, "precision=fp32")
    kept = upcycled(made, tmp_path / "kept", seed, "precision=auto")
    assert (meta(given)["precision"], meta(kept)["precision"]) == ("fp32", "bf16")
    trained(made, kept, "precision=auto")
    assert meta(kept)["precision"] == "bf16"


@pytest.mark.parametrize("attention", ["shared", "untied"])
def test_the_optimizers_state_is_kept_or_reset(made, one_one, tmp_path, attention):
    target = ("feed_forward=moe_4t4i", f"attention={attention}")
    kept = upcycled(made, tmp_path / "kept", one_one, *target, "optimizer=keep")
    reset = upcycled(made, tmp_path / "reset", one_one, *target)
    seed, names = tensors(one_one, "optimizer"), tensors(one_one).keys()
    state, zero = tensors(kept, "optimizer"), tensors(reset, "optimizer")
    assert state.keys() == zero.keys() and not any(tensor.any() for tensor in zero.values())
    for key, tensor in state.items():
        name, _, what = key.removeprefix("state.").rpartition(".")
        source = source_of(name, names)
        if source is None:
            assert name.endswith(".router") and not tensor.any()
        elif what == "step":
            assert tensor == 6
        else:
            moments = seed[f"state.{source}.{what}"]
            assert torch.equal(tensor, as_target(moments, source, name, tensor.shape)) and moments.any()
    experts = state["state.blocks.1.feed_forward.experts.1.w2.exp_avg_sq"]
    assert experts.shape[0] == 4 and torch.equal(
        experts[3], seed["state.blocks.1.feed_forward.experts.1.w2.exp_avg_sq"][0]
    )
    for run in (kept, reset):
        trained(made, run, *target)
    steps = {key: tensor.item() for key, tensor in tensors(kept, "optimizer").items() if key.endswith(".step")}
    assert {key for key, n in steps.items() if n == 6} == {key for key in steps if ".router." in key}
    assert set(steps.values()) == {6.0, 12.0}
    assert not torch.equal(tensors(kept)["head.weight"], tensors(reset)["head.weight"])


def test_untied_moments_are_transposed_with_their_weights(made, dense, tmp_path):
    run = upcycled(made, tmp_path / "run", dense, "feed_forward=dense", "attention=untied", "optimizer=keep")
    for group, prefix, suffix in (("model", "", ""), ("optimizer", "state.", ".exp_avg")):
        old, new = tensors(dense, group), tensors(run, group)
        for leaf in ("wqkv", "wo"):
            name = f"{prefix}blocks.0.attention.{leaf}"
            assert new[name + suffix].shape[0] == 2
            assert all(torch.equal(one, old[f"{name}.weight{suffix}"].T) for one in new[name + suffix])
    trained(made, run, "feed_forward=dense", "attention=untied")


def test_depth_routers_and_their_state_are_kept_auxiliary_routers_are_not(made, depth, tmp_path):
    run = upcycled(made, tmp_path / "run", depth, "feed_forward=moe_4t4i", *DEPTH)
    old, new = tensors(depth), tensors(run)
    for name in ("depth_router", "routing_cutoff", "routing_age"):
        assert torch.equal(old[f"blocks.0.{name}"], new[f"blocks.0.{name}"]) and new[f"blocks.0.{name}"].any()
    for name in filter(is_aux, old):
        assert name in new and not (torch.equal(old[name], new[name]) and old[name].any())
    assert not new["blocks.0.feed_forward.routing_age"].any()
    trained(made, run, "feed_forward=moe_4t4i", *DEPTH)
    bare = upcycled(made, tmp_path / "bare", depth, "feed_forward=moe_4t4i", *DEPTH[:2])
    assert not any(map(is_aux, tensors(bare)))
    trained(made, bare, "feed_forward=moe_4t4i", *DEPTH[:2])


def test_noise_upcycled_is_active_in_an_upcycled_run_alone_and_experts_diverge(made, dense, tmp_path):
    noisy = ("feed_forward=moe_4t4i", "feed_forward.noise=upcycled")
    for name, noise in (("quiet", ()), ("noisy", noisy[1:])):
        run = upcycled(made, tmp_path / name, dense, noisy[0], *noise)
        trained(made, run, noisy[0], *noise)
        trained(made, tmp_path / f"scratch-{name}", noisy[0], *noise)
        stack = tensors(run)["blocks.0.feed_forward.experts.0.w13"]
        apart = [(stack[e] - stack[0]).norm() / stack[0].norm() for e in (1, 2, 3)]
        assert min(apart) > 0.05
    key = "blocks.1.feed_forward.experts.1.w2"
    assert not torch.equal(tensors(tmp_path / "quiet")[key], tensors(tmp_path / "noisy")[key])
    assert torch.equal(tensors(tmp_path / "scratch-quiet")[key], tensors(tmp_path / "scratch-noisy")[key])


@pytest.mark.parametrize(
    ("target", "exact"),
    [
        (("feed_forward=moe_4t4i",), False),
        (("feed_forward=moe_8x",), False),
        (("feed_forward=moe_4t4i_threshold", "feed_forward.layers=interval"), False),
        (("feed_forward=moe_8x_token_choice", "feed_forward.selection.capacity_factor=0.5"), False),
        (("feed_forward=moe_8x_token_choice", "feed_forward.selection.weights=renormalised"), True),
        (("feed_forward=moe_1t1i",), True),
        (("feed_forward=dense", "attention=untied"), True),
    ],
)
def test_the_report_compares_with_the_seed(made, dense, tmp_path, capsys, target, exact):
    capsys.readouterr()
    run = upcycled(made, tmp_path / "run", dense, *target)
    record, out = json.loads((run / "upcycle.json").read_text()), capsys.readouterr().out
    assert record["mode"] == "train" and record["micro_batches"] == 2 and record["exact"] == exact
    assert f"equality with the seed: {record['equality']}" in out
    loss, gap = record["loss"], record["loss"]["gap"]
    assert {"loss", "loss_text", "loss_image"} <= gap.keys() and all(map(math.isfinite, gap.values()))
    for name, value in gap.items():
        assert value == pytest.approx(loss["upcycled"][name] - loss["seed"][name], abs=1e-12)
        assert f"held-out {name}: {loss['seed'][name]:.6f} -> {loss['upcycled'][name]:.6f}" in out
    assert (record["max_logit_difference"] < 1e-4) == exact
    assert (abs(gap["loss"]) < 1e-5) == exact
    for shares in record["layers"].values():
        for kinds in shares.values():
            assert sum(kinds.values()) == pytest.approx(1) and kinds.keys() == {"unserved", "single", "several"}
    if target[0] == "feed_forward=moe_4t4i":
        assert set(record["layers"]) == {"0", "1"} and list(record["layers"]["0"]) == ["text", "image", "all"]
        assert 0.15 < record["layers"]["0"]["all"]["unserved"] < 0.5
    if "feed_forward.layers=interval" in target:
        assert set(record["layers"]) == {"0"}
    if exact:
        assert all(s["all"]["unserved"] == 0 for s in record["layers"].values())


def test_without_report_batches_nothing_is_compared(made, dense, tmp_path):
    run = upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i", "report_batches=0")
    record = json.loads((run / "upcycle.json").read_text())
    assert "loss" not in record and record["seed_step"] == 6


def test_the_seeds_seed_counts_too(made, dense, tmp_path):
    untied = ("feed_forward=dense", "attention=untied")
    middle = trained(made, upcycled(made, tmp_path / "middle", dense, *untied), *untied)
    last = upcycled(made, tmp_path / "last", middle, "feed_forward=moe_4t4i", "attention=untied")
    assert meta(last)["upcycled"]["seed_tokens"] == 2 * 768 and meta(last)["data"]["number"] == 12
    with pytest.raises(ValueError, match="got attention=shared and a seed with attention=untied, need untied"):
        upcycled(made, tmp_path / "shared", middle, "feed_forward=moe_4t4i")


# ---- the command to go on -------------------------------------------------------------------------------------------


def test_the_printed_command_is_the_one_that_goes_on(made, dense, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(upcycling(made, run, dense, "feed_forward=moe_8x", "data.accumulation=2")) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["moma", "train"] and {"feed_forward=moe_8x", f"run_dir={run}"} < set(command)
    assert train.main(compose("train", command[2:])) == 0
    assert meta(run)["step"] == 6 and meta(run)["data"]["number"] == 6 + 12


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=90m_mod", "depth=mod_quota", "optim=paper", "attention=untied", "log=wandb"],
        ["duration.flops=1e15", "eval.interval=null", "checkpoint.interval.steps=7", "optim.decay.steps=10"],
        [
            "+data.mixture.pair=2",
            "feed_forward.layers=[0,2]",
            "feed_forward.experts.text=[2,4]",
            "optim.betas=[0.8,0.9]",
        ],
        ["feed_forward=moe_8x_token_choice", "+feed_forward.experts={text:3,image:2}", "~feed_forward.experts.all"],
        ['data.corpus="/a folder/with, signs"', 'tokenizer="null"', "+log.project=x.y", "parallel.threads=2"],
        ["model.n_kv_heads=1", "feed_forward=dense", "seed.init=3", "seed.data=1", "model.rope_theta=5e4"],
    ],
)
def test_the_command_resolves_to_the_same_configuration(tmp_path, overrides):
    composed = compose("upcycle", ["seed_run=x", *overrides])
    wanted = target_settings(composed.config, tmp_path / "a run")
    command = shlex.split(train_command(composed.overrides, tmp_path / "a run"))
    assert command[:2] == ["moma", "train"] and compose("train", command[2:]).resolved == wanted


def test_the_run_folder_is_that_of_train_with_a_word_more():
    composed = compose("upcycle", ["seed_run=x", "feed_forward=moe_8x", "seed.init=3"])
    assert str(upcycled_run_dir(composed)) == "runs/emoji/tiny-moe_8x-upcycled-s3d0"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "overrides", "text"),
    [
        ("dense", ["model.dim=48"], r"differs from .*dense in more than feed_forward .*\(model.dim: 32 -> 48"),
        ("dense", ["depth=mod"], r"more than feed_forward and attention \(.*depth.kind: full -> mod"),
        ("dense", ["data.rows=3"], r"more than feed_forward and attention \(data.rows: 2 -> 3; plan: "),
        ("dense", ["data.images=2"], r"more than feed_forward and attention \(data.images: 3 -> 2; plan: "),
        ("dense", ["seed.data=1"], r"more than feed_forward and attention \(plan: .*; seed.data: 0 -> 1\)"),
        ("dense", ["+data.mixture.text=0.5"], r"more than feed_forward and attention \(.*data.mixture.text: absent"),
        ("depth", ["depth=mod", "depth.capacity=0.25"], r"\(depth.capacity: 0.5 -> 0.25\), need the same: use the"),
        ("dense", ["feed_forward=moe_4t4i_shared"], "got feed_forward.width=0.5, need 1: experts of another width"),
        ("dense", ["feed_forward.shared=1"], "got feed_forward.shared=1, need 0: a shared expert beside the copies"),
        (
            "one_one",
            ["feed_forward=moe_8x"],
            r"got one feed-forward or group for all modalities in layer 0 and a seed with one per modality, need "
            "groups per modality there, as in moe_4t4i: different feed-forwards have no common copy",
        ),
        ("one_one", ["feed_forward.layers=[0]"], "got one feed-forward or group for all modalities in layer 1"),
        ("one_one", ["feed_forward=dense"], "got one feed-forward or group for all modalities in layer 0"),
        ("one_one", ["feed_forward=moe_1t1i"], "got a target with the seed's own layers, need more experts or untied"),
        ("dense", ["feed_forward=dense"], "got a target with the seed's own layers, need more experts or untied"),
        ("dense", ["feed_forward.layers=[0,5]"], r"got feed_forward.layers=\(0, 5\), need rising layer numbers"),
        ("dense", ["objective=aux_routers"], "got objective=aux_routers, need next_token: train the causal"),
        ("dense", ["init_from=runs/a"], "got init_from=runs/a, need null: the parameters come from seed_run"),
        ("dense", ["copy_noise=-1"], "got copy_noise=-1.0, need a number of 0 or more: 0 makes exact copies"),
        ("dense", ["report_batches=-1"], r"got report_batches=-1, need 0 \(no comparison\) or more"),
        ("dense", ["optimizer=kep"], "got optimizer=kep, need one of keep, reset: did you mean keep"),
        ("dense", ["optim.warmup.steps=9"], "got a warm-up of 9 and a decay of 0 steps, need at most 6 together"),
        ("nowhere", [], "got seed_run=.*nowhere without a checkpoint, need a trained run: train it first"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(made, request, tmp_path, seed, overrides, text):
    folder = tmp_path / "nowhere" if seed == "nowhere" else request.getfixturevalue(seed)
    base = [] if any(o.startswith("feed_forward=") for o in overrides) else ["feed_forward=moe_4t4i"]
    with pytest.raises(ValueError, match=text):
        upcycled(made, tmp_path / "run", folder, *base, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_seed_with_several_experts_is_refused(made, tmp_path):
    seed = trained(made, tmp_path / "seed", "feed_forward=moe_2t2i", "duration={steps:1}")
    with pytest.raises(
        ValueError, match=r"got a seed with \{'text': 2, 'image': 2\} experts in layer 0, need one feed-f"
    ):
        upcycled(made, tmp_path / "run", seed, "feed_forward=moe_4t4i")
    wide = ("feed_forward=moe_1t1i", "feed_forward.width=0.5")
    seed = trained(made, tmp_path / "narrow", *wide, "duration={steps:1}")
    with pytest.raises(ValueError, match="got a seed with feed_forward.width=0.5, need 1"):
        upcycled(made, tmp_path / "run", seed, "feed_forward=moe_4t4i")


def test_a_run_of_auxiliary_routers_is_no_seed(made, depth, tmp_path):
    second = ("feed_forward=dense", *DEPTH[:2], "objective=aux_routers", f"init_from={depth}", "duration={steps:1}")
    aux = trained(made, tmp_path / "aux", *second)
    with pytest.raises(ValueError, match=rf"of objective=aux_routers, need the run it began from: seed_run={depth}"):
        upcycled(made, tmp_path / "run", aux, "feed_forward=moe_4t4i", *DEPTH[:2])


def test_a_corpus_without_held_out_documents_cannot_be_compared_on(made, dense, tmp_path, monkeypatch):
    monkeypatch.setattr("moma.run.open_corpus", lambda c, split, h: {} if split == "val" else open_corpus(c, split, h))
    with pytest.raises(ValueError, match=r"got no held-out document in .*, need some to .* set report_batches=0"):
        upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i")
    upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i", "report_batches=0")


def test_a_folder_with_a_checkpoint_or_a_second_process_is_refused(made, dense, tmp_path):
    run = upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i")
    before = tensors(run)
    for folder in (run, dense):
        with pytest.raises(
            ValueError, match=f"got a checkpoint in {folder}, need a new run folder: set another run_dir"
        ):
            upcycled(made, folder, dense, "feed_forward=moe_4t4i")
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(run).items())
    with checkpoint.alone(tmp_path / "busy"), pytest.raises(ValueError, match="got a second process in .*busy"):
        upcycled(made, tmp_path / "busy", dense, "feed_forward=moe_4t4i")


def test_an_interrupted_save_leaves_no_checkpoint_and_the_same_command_makes_it(made, dense, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "dcp_save", killed)
        upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i")
    assert newest(tmp_path / "run") is None
    upcycled(made, tmp_path / "run", dense, "feed_forward=moe_4t4i")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
    trained(made, tmp_path / "run", "feed_forward=moe_4t4i")
