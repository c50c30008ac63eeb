"""The loop: exact resume, identity, second stage, refusals. Real processes of the loop on a made-up corpus."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch

from moma import checkpoint
from moma.config import compose
from moma.data.shards import open_corpus
from moma.data.synthetic import write_synthetic
from moma.log import MEASURED
from moma.objectives import NextTokenConfig, is_aux
from moma.run import DataConfig, validation_batches
from moma.train import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tokenizer, corpus, vocab = write_synthetic(folder, pairs=60, texts=60)
    return tokenizer, corpus, vocab


def command(made, run_dir, *overrides):
    tokenizer, corpus, _ = made
    return compose(
        "train",
        [
            f"tokenizer={tokenizer}", f"data.corpus={corpus}", f"run_dir={run_dir}",
            "data.rows=2", "data.row_length=64", "data.images=3",
            "model.dim=32", "model.n_layers=2", "model.n_heads=2", "optim.lr=1e-2", "log.interval=2",
            "eval.interval=null", "duration={tokens:1024}", "precision=fp32", *overrides,
        ],
    )  # fmt: skip


def parameters(run_dir):
    return checkpoint.read_tensors(checkpoint.latest(run_dir / "checkpoints"), "model")


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


@pytest.mark.parametrize(
    ("feed_forward", "precision", "more"),
    [
        ("dense", "fp32", ""),
        ("dense", "bf16", ""),
        ("moe_4t4i", "fp32", ""),
        ("moe_4t4i", "bf16", "feed_forward.noise=gumbel"),
        ("moe_4t4i", "bf16", "depth=mod objective.aux_weight=1.0"),
        ("moe_4t4i_threshold", "bf16", "feed_forward.selection.warmup_steps=4 attention=untied"),
        ("moe_8x_token_choice", "bf16", "feed_forward.selection.bias_rate=0.01"),
        ("moe_llava_released", "fp32", "depth=mod_quota"),
    ],
)
def test_resume_is_bit_identical_to_an_uninterrupted_run(made, tmp_path, feed_forward, precision, more):
    overrides = [f"feed_forward={feed_forward}", f"precision={precision}", *more.split()]
    overrides += ["checkpoint.interval.steps=3", "checkpoint.keep_last=0"]
    assert main(command(made, tmp_path / "whole", *overrides)) == 0
    assert main(command(made, tmp_path / "cut", *overrides)) == 0
    # throw away everything after step 3, as a kill would have: it lies between two lines of the log
    saved = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-00000003", "step-00000006", "step-00000008"]
    for folder in saved[1:]:
        shutil.rmtree(folder)
    before = lines(tmp_path / "cut")
    assert main(command(made, tmp_path / "cut", *overrides)) == 0
    assert lines(tmp_path / "cut") == before == lines(tmp_path / "whole")
    a, b = parameters(tmp_path / "whole"), parameters(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_command_again_changes_nothing(made, tmp_path):
    assert main(command(made, tmp_path / "run")) == 0
    before = parameters(tmp_path / "run"), lines(tmp_path / "run")
    assert main(command(made, tmp_path / "run")) == 0
    assert lines(tmp_path / "run") == before[1]
    assert all(torch.equal(before[0][n], t) for n, t in parameters(tmp_path / "run").items())


def test_accumulation_is_one_denominator(made, tmp_path):
    """Two micro-batches a step give the gradient of the mean over all their targets."""
    main(command(made, tmp_path / "run", "data.accumulation=2", "feed_forward=dense"))
    rows = lines(tmp_path / "run")
    assert rows[-1]["step"] == 4 and rows[-1]["tokens"] == 1024


def test_a_signal_finishes_the_step_and_saves(made, tmp_path, capsys):
    long = "duration={tokens:1280000}"
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt_once_it_trains():
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt_once_it_trains, daemon=True).start()
    assert main(command(made, tmp_path / "run", long)) == 0
    assert "run the same command to go on" in capsys.readouterr().out
    meta = checkpoint.read_meta(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert 0 < meta["step"] < 10_000 and meta["data"]["number"] == meta["step"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_configuration_in_the_same_folder_is_refused_with_the_differences(made, tmp_path):
    main(command(made, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"got a configuration that is not the one of .*optim.lr: 0.01 -> 0.02"):
        main(command(made, tmp_path / "run", "optim.lr=2e-2"))
    with pytest.raises(ValueError, match=r"feed_forward.kind: sparse -> dense"):
        main(command(made, tmp_path / "run", "feed_forward=dense"))
    main(command(made, tmp_path / "run", "log.interval=1"))  # a free field


def test_aux_routers_train_on_frozen_parameters(made, tmp_path):
    main(command(made, tmp_path / "base"))
    second = ["objective=aux_routers", f"init_from={tmp_path / 'base'}", "duration={tokens:20480}"]
    main(command(made, tmp_path / "aux", *second))
    base, both = parameters(tmp_path / "base"), parameters(tmp_path / "aux")
    assert all(torch.equal(base[name], both[name]) for name in base)
    new = both.keys() - base.keys()
    assert new == {n for n in both if is_aux(n)} and any(".aux." in n for n in new)
    assert all(both[name].any() for name in new if name.endswith("aux_cutoff"))
    rows = lines(tmp_path / "aux")
    assert rows[-1]["aux_loss"] < rows[0]["aux_loss"]


def test_joint_training_of_aux_routers_leaves_the_model_alone(made, tmp_path):
    """Stop-gradient and a clipping of their own: every other parameter is the same to the last bit."""
    both = ["depth=mod", "optim.clip_norm=0.1", "feed_forward.noise=gumbel"]
    main(command(made, tmp_path / "without", *both))
    main(command(made, tmp_path / "joint", *both, "objective.aux_weight=1.0"))
    without, joint = parameters(tmp_path / "without"), parameters(tmp_path / "joint")
    assert all(torch.equal(without[name], joint[name]) for name in without)
    assert joint.keys() - without.keys() == {n for n in joint if is_aux(n)}
    rows, plain = lines(tmp_path / "joint"), lines(tmp_path / "without")
    assert [r["loss"] for r in rows] == [r["loss"] for r in plain] and rows[-1]["aux_loss"] < rows[0]["aux_loss"]
    assert [r["grad_norm"] for r in rows] == [r["grad_norm"] for r in plain]
    main(command(made, tmp_path / "held", "objective.aux_weight=1.0", "eval.interval.steps=4"))
    assert "val_loss" in lines(tmp_path / "held")[-1]
    with pytest.raises(ValueError, match="got aux_weight=-1.0, need 0 .not trained along. or more: change it"):
        command(made, tmp_path / "less", "objective.aux_weight=-1.0")
    with pytest.raises(ValueError, match="got a model whose routers need no predictors"):
        main(command(made, tmp_path / "none", "objective.aux_weight=1.0", "feed_forward=moe_4t4i_threshold"))
    assert not (tmp_path / "none").exists()


def test_routing_state_follows_the_training(made, tmp_path):
    """The checkpoint's cut-offs are the moving average of what the steps observed; evaluation moves nothing."""
    main(command(made, tmp_path / "run", "feed_forward=moe_4t4i", "eval.interval.steps=2"))
    state = {n: t for n, t in parameters(tmp_path / "run").items() if "routing_" in n}
    assert {n.split(".")[-1] for n in state} == {"routing_cutoff", "routing_age"}
    assert all((t == 8).all() for n, t in state.items() if n.endswith("age"))
    assert all(t.any() and t.isfinite().all() for t in state.values())


def test_router_losses_and_diagnostics_are_logged(made, tmp_path):
    main(command(made, tmp_path / "run", "feed_forward=moe_8x_token_choice", "depth=mod"))
    row = lines(tmp_path / "run")[-1]
    # top-1 of 8 over two layers: alpha times at least about 1 per layer, and the z-loss of small logits
    assert 0.015 < row["balance_loss"] < 0.1 and 0 < row["router_z_loss"] < 0.1
    assert row["router/0.depth/picks_text"] + row["router/0.depth/picks_image"] > 0
    assert row["router/1/single_text"] == 1 and row["router/1/unserved_image"] == row["router/1/several_image"] == 0
    assert 0 < row["router/1/entropy_text"] <= 1 and row["router/1/grad_norm"] > 0
    main(command(made, tmp_path / "ec", "feed_forward=moe_4t4i"))
    row = lines(tmp_path / "ec")[-1]
    parts = sum(row[f"router/0/{part}_text"] for part in ("unserved", "single", "several"))
    assert parts == pytest.approx(1) and row["router/0/entropy_text"] == pytest.approx(1)  # equal loads by construction


@pytest.mark.parametrize("feed_forward", ["dense", "moe_1t1i", "moe_8x_token_choice", "moe_4t4i_threshold"])
def test_models_without_routers_have_no_second_stage(made, tmp_path, feed_forward):
    main(command(made, tmp_path / "base", f"feed_forward={feed_forward}"))
    with pytest.raises(ValueError, match="got a model whose routers need no predictors, need one with expert ch"):
        main(
            command(made, tmp_path / "aux", f"feed_forward={feed_forward}", "objective=aux_routers",
                    f"init_from={tmp_path / 'base'}")
        )  # fmt: skip
    assert not (tmp_path / "aux").exists()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.images=64"], r"got images=64 per micro-batch, need at most \d+"),
        (["init_from=/nowhere"], r"got init_from=/nowhere without a checkpoint, need a trained run"),
        (["parallel.device=cuda"], r"got device=cuda, need a GPU"),
        (["data.corpus=/nowhere"], r"got no manifest.json in /nowhere, need a prepared corpus"),
        (["+data.mixture.pears=1"], r"got mixture weights for \['pears'\]"),
        (["tokenizer=smal"], r"got tokenizer 'smal', need a folder with a vocab.json"),
    ],
)
def test_bad_requests_leave_nothing_behind(made, tmp_path, monkeypatch, overrides, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=text):
        main(command(made, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    ["model.norm_order=pre", "model.n_heads=4", "feed_forward.selection.capacity_factor=0.5", "data.rows=1"],
)
def test_routers_start_only_from_the_same_model_and_micro_batch(made, tmp_path, override):
    main(command(made, tmp_path / "base"))
    second = ["objective=aux_routers", f"init_from={tmp_path / 'base'}", "data.images=2", override]
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=rf"got init_from=.*base of another model \(.*{key}: .*need the same"):
        main(command(made, tmp_path / "aux", *second))
    assert not (tmp_path / "aux").exists()


def test_a_longer_horizon_is_said_and_goes_on(made, tmp_path, capsys):
    main(command(made, tmp_path / "run"))
    assert main(command(made, tmp_path / "run", "duration.tokens=2048")) == 0
    assert "8 steps before, 16 now: the learning rate follows the new horizon" in capsys.readouterr().out
    assert lines(tmp_path / "run")[-1]["step"] == 16


def test_sources_are_counted(made, tmp_path, capsys):
    main(command(made, tmp_path / "run"))
    last = lines(tmp_path / "run")[-1]
    assert last["data/pair/tokens"] + last["data/text/tokens"] == 1024
    assert last["data/pair/share"] + last["data/text/share"] == pytest.approx(1)
    assert 0 < last["data/pair/passes"] < 1
    assert "realised shares of tokens: pair" in capsys.readouterr().out


def test_a_corpus_without_held_out_documents_is_refused_before_training(made, tmp_path):
    tokenizer, corpus, vocab = made
    bare = tmp_path / "bare"
    shutil.copytree(corpus, bare)
    manifest = json.loads((bare / "manifest.json").read_text())
    for source in manifest["splits"]["val"].values():
        source |= {"shards": [], "tokens": 0, "documents": 0, "images": 0}
    (bare / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"got no held-out document in .*bare, need some to evaluate"):
        main(command((tokenizer, bare, vocab), tmp_path / "run", "eval.interval.steps=2"))
    assert not (tmp_path / "run").exists()


def test_validation_follows_the_mixture(made):
    _, corpus, vocab = made
    data = DataConfig(corpus, 2, 64, 3, mixture={"text": 0.0})
    batches = list(validation_batches(corpus, vocab, data, None, torch.device("cpu")))
    pairs = int(open_corpus(corpus, "val", vocab.hash)["pair"].document_tokens.sum())
    assert sum(int((b.document_RL >= 0).sum()) for b in batches) == pairs


@pytest.mark.parametrize("feed_forward", ["dense", "moe_4t4i"])
def test_without_balance_a_run_trains_and_is_evaluated_as_the_balanced_one(made, tmp_path, capsys, feed_forward):
    own = (f"feed_forward={feed_forward}", "duration={steps:6}", "eval.interval={steps:6}", "eval.batches=2")
    own += ("data.balance=false", "checkpoint.interval={steps:3}", "parallel.compile=off")
    assert main(command(made, tmp_path / "run", *own)) == 0
    assert "3 images on average, not balanced" in capsys.readouterr().out
    straight = parameters(tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert main(command(made, tmp_path / "run", *own)) == 0  # from step 3 on
    assert all(torch.equal(straight[name], tensor) for name, tensor in parameters(tmp_path / "run").items())
    values = lines(tmp_path / "run")[-1]
    assert values["step"] == 6 and 0 < values["loss"] < 10 and 0 < values["val_loss"] < 10
    with pytest.raises(ValueError, match=r"data.balance: False -> True; plan: "):
        main(command(made, tmp_path / "run", *own, "data.balance=true"))


def test_stages_change_the_mixture_and_must_lie_inside_the_run(made, tmp_path, capsys):
    own = ("feed_forward=dense", "duration={steps:8}", "data.accumulation=2")
    stage = "data.stages=[{at: {percent: 50}, mixture: {pair: 0, text: 1}}]"
    with pytest.raises(ValueError, match=r"data.stages\[0\]: got images=3 per micro-batch, need a source with images"):
        main(command(made, tmp_path / "run", *own, stage))
    for at in ("{steps: 0}", "{steps: 8}", "{percent: 100}"):
        with pytest.raises(ValueError, match=r"got data.stages that begin after steps \[\d\] of 8, need rising steps"):
            main(command(made, tmp_path / "run", *own, f"data.stages=[{{at: {at}, mixture: {{}}}}]"))
    stage = "data.stages=[{at: {tokens: 1024}, mixture: {pair: 1, text: 2}}]"
    assert main(command(made, tmp_path / "run", *own, stage)) == 0
    told = capsys.readouterr().out
    assert "in stage 0: pair" in told and "in stage 1: pair" in told
    begun = checkpoint.read_meta(checkpoint.latest(tmp_path / "run" / "checkpoints"))["data"]["begun"]
    assert [sum(tokens) for tokens in begun] == [1024]


def test_two_runs_in_one_folder_are_refused(made, tmp_path):
    with checkpoint.alone(tmp_path / "run"), pytest.raises(ValueError, match="got a second process in .*run, need one"):
        main(command(made, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.accumulation=0", "got accumulation=0, need at least 1 micro-batch per step"),
        ("data.rows=0", "got rows=0"),
        ("eval.batches=0", "got batches=0, need at least 1: interval=null turns evaluation off"),
        ("checkpoint.keep_last=-1", "got keep_last=-1, need 0 .keep all. or more"),
        ("parallel.threads=0", "got threads=0, need at least 1, or null"),
        ("model.n_heads=0", "need at least 1 of each"),
        ("model.n_layers=0", "need at least 1 of each"),
        ("model.hidden_dim=0", "need at least 1 of each"),
    ],
)
def test_sizes_are_checked_when_the_configuration_is_built(made, tmp_path, override, text):
    with pytest.raises(ValueError, match=text):
        command(made, tmp_path / "run", override)


def test_a_run_of_losses_that_are_not_finite_ends(made, tmp_path):
    wild = ("optim.lr=1e30", "optim.clip_norm=1e30", "feed_forward=dense", "max_skipped=2")
    with pytest.raises(ValueError, match=r"not finite in 3 steps, .*, need at most max_skipped=2: .* lower optim.lr"):
        main(command(made, tmp_path / "run", *wild))


def test_chosen_steps_are_traced_and_sources_and_parts_logged(made, tmp_path):
    run = tmp_path / "run"
    assert (
        main(
            command(made, run, "feed_forward=moe_4t4i", "profile.start=1", "profile.steps=2", "eval.interval={steps:4}")
        )
        == 0
    )
    trace = json.loads((run / "profile" / "steps-2-3-rank0.json").read_text())
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])
    last = lines(run)[-1]
    per_source = [last[f"loss_source/{name}"] for name in ("pair", "text")]
    assert min(per_source) < last["loss"] < max(per_source)
    parts = [value for name, value in last.items() if name.startswith("grad_norm/")]
    assert sum(value**2 for value in parts) ** 0.5 == pytest.approx(last["grad_norm"], rel=1e-5)
    assert last["micro_batches"] == last["step"] and last["skipped_steps"] == 0
    assert last["val_threshold_loss"] > 0
    with pytest.raises(ValueError, match=r"got profile.start=-1 and profile.steps=0, need 0 or more: steps=0 turns it"):
        command(made, run, "profile.start=-1")


@pytest.mark.parametrize("z_weight", [-1e-5, 0.5])
def test_a_z_loss_that_is_no_small_one_is_refused(z_weight):
    with pytest.raises(ValueError, match=rf"got z_weight={z_weight}, need 0 to 0.01 "):
        NextTokenConfig(z_weight=z_weight)
