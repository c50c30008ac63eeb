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
from moma.train import DataConfig, main, validation_batches


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
    timing = ("tokens_per_second", "data_wait_s")
    return [{k: v for k, v in row.items() if k not in timing and not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("feed_forward", "precision", "noise"),
    [
        ("dense", "fp32", None),
        ("dense", "bf16", None),
        ("moe_4t4i", "fp32", "none"),
        ("moe_4t4i", "bf16", "none"),
        ("moe_4t4i", "bf16", "gumbel"),
    ],
)
def test_resume_is_bit_identical_to_an_uninterrupted_run(made, tmp_path, feed_forward, precision, noise):
    overrides = [f"feed_forward={feed_forward}", f"precision={precision}"]
    overrides += [f"feed_forward.noise={noise}"] if noise else []
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

    threading.Thread(target=interrupt_once_it_trains, daemon=True).start()
    assert main(command(made, tmp_path / "run", long)) == 0
    assert "run the same command to go on" in capsys.readouterr().out
    meta = checkpoint.read_meta(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert 0 < meta["step"] < 10_000 and meta["data"]["number"] == meta["step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    assert {name for name in both if name not in base} == {n for n in both if ".aux." in n} != set()
    rows = lines(tmp_path / "aux")
    assert rows[-1]["aux_loss"] < rows[0]["aux_loss"]


@pytest.mark.parametrize("feed_forward", ["dense", "moe_1t1i"])
def test_models_without_routers_have_no_second_stage(made, tmp_path, feed_forward):
    main(command(made, tmp_path / "base", f"feed_forward={feed_forward}"))
    with pytest.raises(ValueError, match="got a model without learned routers, need one for objective=aux_routers"):
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


def test_two_runs_in_one_folder_are_refused(made, tmp_path):
    with checkpoint.alone(tmp_path / "run"), pytest.raises(ValueError, match="got a second process in .*run, need one"):
        main(command(made, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.accumulation=0", "got accumulation=0, need at least 1 micro-batch per step"),
        ("data.rows=0", "got rows=0"),
        ("eval.batches=0", "got batches=0, need at least 1: interval=null turns evaluation off"),
        ("checkpoint.keep_last=-1", "got keep_last=-1, need at least 1, or 0 to keep all"),
        ("parallel.threads=0", "got threads=0, need at least 1, or null"),
        ("model.n_heads=0", "need at least 1 of each"),
        ("model.n_layers=0", "need at least 1 of each"),
        ("model.hidden_dim=0", "need at least 1 of each"),
    ],
)
def test_sizes_are_checked_when_the_configuration_is_built(made, tmp_path, override, text):
    with pytest.raises(ValueError, match=text):
        command(made, tmp_path / "run", override)


def test_a_loss_that_is_not_finite_stops_the_run(made, tmp_path):
    with pytest.raises(ValueError, match=r"not finite at or before step \d+ .* lower optim.lr"):
        main(command(made, tmp_path / "run", "optim.lr=1e30", "optim.clip_norm=1e30", "feed_forward=dense"))
