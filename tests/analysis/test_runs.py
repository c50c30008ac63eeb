"""Run folders are read whole or refused; a routers' run lends its evaluation to the run it started from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moma.analysis.runs import collect, read_metrics, read_run


def write(folder: Path, text: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text(text)
    return path


def test_validation_lines_get_their_flops_from_their_neighbours(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"step": 5, "val_loss": 4.5}\n{"step": 10, "loss": 4.0, "flops": 100.0, "z_loss": null}\n'
        '{"step": 15, "val_loss": 3.5}\n{"step": 20, "loss": 3.0, "flops": 200.0}\n'
        '{"step": 20, "val_loss": 3.1}\n{"step": 25, "val_loss": 3.0}\n',
    )
    found = read_metrics(path)
    assert found["step"].tolist() == [5, 10, 15, 20, 25]
    assert found["flops"].tolist() == [50, 100, 150, 200, 250]
    assert np.array_equal(found["loss"], [np.nan, 4, np.nan, 3, np.nan], equal_nan=True)
    assert np.array_equal(found["val_loss"], [4.5, np.nan, 3.5, 3.1, 3.0], equal_nan=True)
    assert "z_loss" not in found


def test_a_half_written_last_line_is_left_out_and_an_earlier_one_refused(tmp_path: Path) -> None:
    good = '{"step": 10, "loss": 4.0, "flops": 100.0}\n'
    assert read_metrics(write(tmp_path, good + '{"step": 20, "lo'))["step"].tolist() == [10]
    with pytest.raises(ValueError, match=r"got a damaged line 2 in .*need one JSON object with a step per line"):
        read_metrics(write(tmp_path, good + '{"step": 20, "lo\n' + good))
    with pytest.raises(ValueError, match=r"got a damaged line 1 .*: resume the run"):
        read_metrics(write(tmp_path, "[1]\n" + good))


def test_what_is_no_run_is_refused(tmp_path: Path, study: dict) -> None:
    with pytest.raises(ValueError, match=r"got no folder .*nowhere, need one that `moma train` wrote"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without a checkpoint, need a run that has saved one: train it first"):
        read_run(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(study["runs"][0], run)
    (run / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"got a damaged .*eval.json .* need JSON: run moma evaluate again"):
        read_run(run)
    (run / "eval.json").write_text("[]")
    with pytest.raises(ValueError, match="with a list, need a JSON object"):
        read_run(run)
    (run / "eval.json").unlink()
    assert read_run(run).eval is None
    write(run, "")
    with pytest.raises(ValueError, match=r"got no whole line in .*: train for longer"):
        read_run(run)
    write(run, '{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"got no flops in .*, need them in at least one line"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"got no .*metrics.jsonl, need the metrics of a run"):
        read_run(run)
    next(run.glob("checkpoints/*/meta.json")).write_text("{}")
    with pytest.raises(ValueError, match="without a configuration, need one that `moma train` wrote"):
        read_run(run)


def test_the_newest_checkpoint_speaks(tmp_path: Path, study: dict) -> None:
    run = tmp_path / "run"
    shutil.copytree(study["runs"][0], run)
    newest = run / "checkpoints/step-99999999"
    newest.mkdir()
    meta = json.loads(next(run.glob("checkpoints/*/meta.json")).read_text())
    (newest / "meta.json").write_text(json.dumps(meta | {"step": 99999999}))
    assert read_run(run).meta["step"] == 99999999


def test_a_routers_run_lends_its_evaluation_to_the_run_it_started_from(study: dict) -> None:
    dense, sparse = collect(study["runs"])
    assert (dense.variant, sparse.variant) == ("dense", "moe_4t4i")
    assert dense.is_dense and dense.seed == sparse.seed == (0, 0)
    assert sparse.name == "tiny-moe_4t4i-s0" and sparse.routers is not None
    assert sparse.eval is not None and {"train", "aux"} < set(sparse.eval["loss"])
    assert np.isnan(dense.column("no_such_metric")).all()


def test_a_routers_run_brings_its_run_along(study: dict) -> None:
    dense, _, aux = study["runs"]
    assert [run.name for run in collect([aux, dense])] == [run.name for run in collect(study["runs"])]


def test_runs_that_do_not_fit_together_are_refused(tmp_path: Path, study: dict) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study["runs"][0], copy)
    with pytest.raises(ValueError, match="both dense with the same seeds, need one run per variant and seed"):
        collect([study["runs"][0], copy])
    alone = tmp_path / "alone"
    shutil.copytree(study["runs"][2], alone)
    path = next(alone.glob("checkpoints/*/meta.json"))
    meta = json.loads(path.read_text())
    meta["config"]["init_from"] = str(tmp_path / "gone")
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"which trained routers of .*gone, need that run beside it: add it to runs"):
        collect([alone])


SPARSE = {"kind": "sparse", "experts": {"text": 4, "image": 4}}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"feed_forward": {"kind": "dense"}}, "dense"),
        ({"feed_forward": {"kind": "sparse", "experts": {"all": 8}}}, "moe_8x"),
        ({"feed_forward": {"kind": "sparse", "experts": {"text": 7, "image": 1}}}, "moe_7t1i"),
        ({"feed_forward": {"kind": "sparse", "experts": {"text": [4, 2], "image": 1}}}, "moe_4_2t1i"),
        ({"feed_forward": {**SPARSE, "selection": {"kind": "threshold"}}}, "moe_4t4i_threshold"),
        ({"feed_forward": {**SPARSE, "shared": 1}}, "moe_4t4i_shared"),
        ({"feed_forward": {**SPARSE, "noise": "gumbel", "layers": "interval"}}, "moe_4t4i_gumbel_interval"),
        ({"feed_forward": {**SPARSE, "noise": "none", "layers": [0, 3], "selection": {"capacity_factor": 2.0}}},
         "moe_4t4i_l-0-3_c2.0"),
        ({"feed_forward": {**SPARSE, "selection": {"kind": "token_choice", "k": 2, "weights": "renormalised",
                                                   "capacity_factor": None}}},
         "moe_4t4i_token_choice_k2_renormalised"),
        ({"feed_forward": {"kind": "dense"}, "depth": {"kind": "mod"}}, "mod_dense"),
        ({"feed_forward": SPARSE, "depth": {"kind": "mod_quota"}, "attention": {"kind": "untied"}},
         "mod_quota_moe_4t4i_untied"),
        ({"feed_forward": SPARSE, "objective": {"kind": "next_token", "aux_weight": 1.0}}, "moe_4t4i_joint"),
    ],
)  # fmt: skip
def test_variants_have_the_papers_names(study: dict, config: dict, name: str) -> None:
    run = read_run(study["runs"][0])
    run.config.update(config)
    assert run.variant == name and run.is_dense == (name == "dense")
    run.meta["upcycled"] = {"seed_run": "somewhere"}
    assert run.variant == f"{name}_upcycled"


def test_an_upcycled_run_begins_where_its_seed_stopped(study: dict) -> None:
    """What the seed cost is on the curve: eta of an upcycled run counts both stages."""
    folder = study["runs"][0]
    plain = read_run(folder)
    path = max(folder.glob("checkpoints/*/meta.json"))
    meta = json.loads(path.read_text())
    before = path.read_text()
    path.write_text(json.dumps(meta | {"upcycled": {"seed_run": "seed", "seed_tokens": 1000, "seed_flops": 5e9}}))
    try:
        upcycled = read_run(folder)
    finally:
        path.write_text(before)
    assert (upcycled.metrics["flops"] - plain.metrics["flops"] == 5e9).all()
    assert (upcycled.metrics["loss"] == plain.metrics["loss"]).all()
