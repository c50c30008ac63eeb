"""`evaluate` end to end on a made-up corpus: modes, baselines, routers, maps."""

import json

import pytest

from moma import checkpoint, evaluate
from moma.config import compose
from moma.data.synthetic import write_synthetic
from moma.train import main as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tokenizer, corpus, _ = write_synthetic(folder, pairs=80, texts=80)
    common = [
        f"tokenizer={tokenizer}", f"data.corpus={corpus}", "data.rows=2", "data.row_length=64", "data.images=3",
        "model.dim=32", "model.n_layers=2", "model.n_heads=2", "optim.lr=1e-2", "precision=fp32",
        "eval.interval.percent=100", "eval.batches=4", "log.interval=20",
    ]  # fmt: skip

    def run(name, *overrides):
        assert train(compose("train", [*common, f"run_dir={folder / name}", *overrides])) == 0
        return folder / name

    sparse = run("sparse", "duration.tokens=8192")
    return {
        "dense": run("dense", "duration.tokens=8192", "feed_forward=dense"),
        "sparse": sparse,
        "aux": run("aux", "duration.tokens=8192", "objective=aux_routers", f"init_from={sparse}"),
    }


def evaluated(run, *overrides):
    assert evaluate.main(compose("evaluate", [f"run={run}", "batches=4", *overrides])) == 0
    return json.loads((run / "eval.json").read_text())


def test_every_mode_is_named_and_equals_the_validation_of_training(runs, capsys):
    dense, sparse, aux = (evaluated(runs[name]) for name in ("dense", "sparse", "aux"))
    assert dense["loss"].keys() == {"causal"} and sparse["loss"].keys() == {"train"}
    assert aux["loss"].keys() == {"train", "aux"}
    for name, result, mode in (("dense", dense, "causal"), ("sparse", sparse, "train"), ("aux", aux, "train")):
        base = "sparse" if name == "aux" else name
        last = [json.loads(line) for line in (runs[base] / "metrics.jsonl").read_text().splitlines()][-1]
        assert result["loss"][mode]["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert aux["loss"]["aux"]["loss"] != aux["loss"]["train"]["loss"]
    assert dense["baselines"] == sparse["baselines"] and dense["baselines"]["text_bigram"] < 5.6
    assert "baseline text" in capsys.readouterr().out


def test_router_numbers_and_maps(runs):
    result = evaluated(runs["aux"])
    assert result["routing"].keys() == {"training", "free_running"}
    for layers in result["routing"].values():
        assert len(layers) == 2
        for layer in layers:
            assert 0.7 <= layer["majority"] <= 0.8 and 0 <= layer["auc"] <= 1
            assert layer["experts_true"] == pytest.approx(1.0, abs=0.05)
    maps = result["maps"]
    assert maps["experts"] == [f"{m} {e}" for m in ("text", "image") for e in range(4)]
    share = maps["share"]["train"][0]
    assert share[0][1] == 0 and share[4][0] == 0  # a text expert computes no image token, and the other way
    assert share[0][0] == pytest.approx(0.25, abs=0.02) and share[7][1] == pytest.approx(0.25, abs=0.02)
    places = maps["image_position"]["train"][0][4]
    assert len(places) == 16 and sum(places) / 16 == pytest.approx(0.25, abs=0.02)


def test_the_checkpoint_stays_as_it_is(runs):
    before = checkpoint.read_meta(checkpoint.latest(runs["dense"] / "checkpoints"))
    evaluated(runs["dense"])
    assert checkpoint.read_meta(checkpoint.latest(runs["dense"] / "checkpoints")) == before


def test_refusals(runs, tmp_path):
    with pytest.raises(ValueError, match="got batches=0, need at least 1, or null for the whole split"):
        compose("evaluate", ["run=x", "batches=0"])
    (runs["dense"] / "eval.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"vqgan"):  # the made-up tokenizer draws no pictures: said before any work
        evaluated(runs["dense"], "pictures=20")
    assert not (runs["dense"] / "eval.json").exists()
    with pytest.raises(ValueError, match=r"got pictures=3, need 0 \(none\) or at least 20"):
        compose("evaluate", ["run=x", "pictures=3"])
    with pytest.raises(ValueError, match=r"got .*nothing without a checkpoint, need a trained run"):
        evaluated(tmp_path / "nothing")


def test_more_pictures_than_held_out_pairs_are_refused_before_any_work(runs, monkeypatch):
    monkeypatch.setattr(evaluate.ImageTokenizer, "load", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "PictureFeatures", lambda: None)
    (runs["dense"] / "eval.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"got pictures=500, need at most the \d+ held-out pairs of .*: lower it"):
        evaluated(runs["dense"], "pictures=500")
    assert not (runs["dense"] / "eval.json").exists()
