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

    short = "duration.tokens=8192"
    sparse = run("sparse", short)
    tight = ["feed_forward.selection.k=2", "feed_forward.selection.capacity_factor=1.0"]
    return {
        "dense": run("dense", short, "feed_forward=dense"),
        "sparse": sparse,
        "aux": run("aux", short, "objective=aux_routers", f"init_from={sparse}"),
        "token_choice": run("token_choice", short, "feed_forward=moe_8x_token_choice", *tight),
        "mod": run("mod", short, "depth=mod", "feed_forward.layers=[1]", "model.n_layers=3"),
    }


def evaluated(run, *overrides):
    assert evaluate.main(compose("evaluate", [f"run={run}", "batches=4", *overrides])) == 0
    return json.loads((run / "eval.json").read_text())


def test_every_mode_is_named_and_equals_the_validation_of_training(runs, capsys):
    found = {name: evaluated(run) for name, run in runs.items()}
    modes = {
        "dense": ["causal"],
        "sparse": ["train", "threshold"],
        "aux": ["train", "aux", "aux_calibrated", "threshold"],
        "token_choice": ["train", "causal"],
        "mod": ["train", "threshold"],
    }
    for name, result in found.items():
        assert list(result["loss"]) == modes[name]
        base = "sparse" if name == "aux" else name
        last = [json.loads(line) for line in (runs[base] / "metrics.jsonl").read_text().splitlines()][-1]
        assert result["loss"][modes[name][0]]["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
        assert list(result["gap"]) == modes[name][1:]
        for mode, gap in result["gap"].items():
            assert gap.keys() == {"loss", "loss_text", "loss_text_plain", "loss_image"}
            for key, value in gap.items():
                assert value == result["loss"][mode][key] - result["loss"]["train"][key] != 0
        assert result["baselines"] == found["dense"]["baselines"]
    assert found["dense"]["baselines"]["text_bigram"] < 5.6
    printed = capsys.readouterr().out
    assert "baseline text" in printed and "router 0.depth threshold on training states: accuracy 0." in printed


def test_router_numbers_and_maps(runs):
    result = evaluated(runs["aux"])
    assert result["routing"].keys() == {"training", "free_running"}
    for routers in result["routing"].values():
        assert list(routers) == ["0", "1"]
        for rules in routers.values():
            assert list(rules) == ["aux", "aux_calibrated", "threshold"]
            for rule in rules.values():
                assert 0.7 <= rule["majority"] <= 0.8 and 0 <= rule["auc"] <= 1
                assert rule["experts_true"] == pytest.approx(1.0, abs=0.05) and 0 <= rule["tie_share"] <= 1
    training = result["routing"]["training"]["0"]
    assert training["threshold"]["auc"] > 0.8 and training["threshold"]["accuracy"] > 0.85
    for rule in ("aux_calibrated", "threshold"):
        assert training[rule]["experts_predicted"] == pytest.approx(1.0, abs=0.35)
    maps = result["maps"]
    assert (maps["modalities"], maps["grid"]) == (["text", "image"], [4, 4])
    first = maps["routers"]["0"]
    assert first["columns"] == [f"{m} {e}" for m in ("text", "image") for e in range(4)]
    assert first["expected"] == [0.25] * 8 and first["share"].keys() == result["loss"].keys()
    share = first["share"]["train"]
    assert share[0][1] == 0 and share[4][0] == 0  # a text expert computes no image token, and the other way
    assert share[0][0] == pytest.approx(0.25, abs=0.02) and share[7][1] == pytest.approx(0.25, abs=0.02)
    places = first["image_position"]["train"][4]
    assert len(places) == 16 and sum(places) / 16 == pytest.approx(0.25, abs=0.02)
    assert first["top_tokens"][0] and isinstance(first["top_tokens"][0][0][0], str) and first["top_tokens"][7] == []
    one = result["diagnostics"]["train"]["0"]["image"]
    assert one["none"] + one["one"] + one["several"] == pytest.approx(1)
    assert one["load_entropy"] == pytest.approx(1, abs=1e-3) and sum(one["load"]) == pytest.approx(1, abs=0.05)
    assert result["diagnostics"].keys() == result["loss"].keys()
    assert result["specialisation"]["1"].keys() == {"text", "image"}


def test_layers_with_different_routers(runs):
    result = evaluated(runs["mod"])
    assert list(result["maps"]["routers"]) == ["0.depth", "1", "2.depth"]
    assert result["maps"]["routers"]["0.depth"]["columns"] == ["depth"]
    assert list(result["routing"]["free_running"]) == ["0.depth", "1", "2.depth"]
    assert result["routing"]["training"]["0.depth"]["threshold"]["experts_true"] == pytest.approx(0.25, abs=0.01)
    assert list(result["specialisation"]) == ["1"]
    assert "error_injection" not in result
    choice = evaluated(runs["token_choice"])
    assert "routing" not in choice and choice["diagnostics"]["train"]["0"]["text"]["dropped"] > 0


def test_planted_errors(runs, capsys):
    result = evaluated(runs["mod"], "error_rates=[0.0,0.1]", "batches=2")
    assert result["error_injection"].keys() == {"experts", "depth"}
    for clean, wrong in result["error_injection"].values():
        assert clean["loss"] == pytest.approx(result["loss"]["train"]["loss"], rel=1e-5)
        assert wrong["loss"] != clean["loss"] and wrong["realised_rate"] == pytest.approx(0.1, abs=0.05)
    assert "errors 10.00% in depth: all" in capsys.readouterr().out


def test_the_checkpoint_stays_as_it_is(runs):
    before = checkpoint.read_meta(checkpoint.latest(runs["dense"] / "checkpoints"))
    evaluated(runs["dense"])
    assert checkpoint.read_meta(checkpoint.latest(runs["dense"] / "checkpoints")) == before


def test_refusals(runs, tmp_path):
    with pytest.raises(ValueError, match=r"got error rates \[2.0\], need numbers in \[0, 1\]"):
        compose("evaluate", ["run=x", "error_rates=[2.0]"])
    with pytest.raises(ValueError, match=r"got error_rates=\[0.1\] for .*, which has no routers, need a sparse run"):
        evaluated(runs["dense"], "error_rates=[0.1]")
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
