"""Runs are sorted by size, the unfinished ones named and left out, and what does not compare is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moma.analysis.runs import read_run
from moma.analysis.study import final_flops, read_study, run_folders, size_of


@pytest.fixture
def root(sweep: dict, tmp_path: Path) -> Path:
    """A copy of the smallest size, to be damaged."""
    for folder in sweep["root"].glob("128x4-*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    return tmp_path / "runs"


def change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = next(folder.glob("checkpoints/*/meta.json"))
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_a_study_has_sizes_smallest_first_and_dense_first(sweep: dict) -> None:
    study = read_study([str(sweep["root"] / "*"), str(sweep["root"] / "128x4-dense-s0")])  # named twice, read once
    assert list(study.sizes) == ["128×4", "192×4", "256×6"] and len(study.runs) == 18
    assert [run.variant for run in study.sizes["192×4"]] == ["dense"] * 3 + ["moe_4t4i"] * 3
    assert study.left_out == () and study.notes == () and study.variants == ["dense", "moe_4t4i"]


def test_sizes_have_the_papers_names(sweep: dict) -> None:
    run = read_run(sweep["root"] / "128x4-dense-s0")
    run.config["model"] = {"dim": 2048, "n_layers": 24}
    assert size_of(run) == "1.4b"


def test_mixture_of_depths_stands_beside_the_dense_model_that_costs_as_much(sweep: dict, root: Path) -> None:
    def deeper(meta: dict[str, Any]) -> None:
        meta["config"]["model"]["n_layers"] = 7
        meta["config"]["depth"] = {"kind": "mod"}

    folder = sweep["write_run"](root / "mod", {"text": 4, "image": 4}, 0, 30, shape=(128, 4), cost=1.02e7)
    change(folder, deeper)
    study = read_study([str(root / "*")])
    assert list(study.sizes) == ["128×4"] and study.variants == ["dense", "mod_moe_4t4i", "moe_4t4i"]
    assert "Settings differ beside the feed-forward: model (mod_moe_4t4i, seed 0)." in study.notes
    shutil.rmtree(folder)
    folder = sweep["write_run"](root / "mod", {"text": 4, "image": 4}, 0, 30, shape=(128, 4), cost=2e7)
    change(folder, deeper)
    (left,) = read_study([str(root / "*")]).left_out
    assert left.folder == folder and left.reason == "no dense run of its size (128×7, 0.02 GFLOP per token)"


def test_unfinished_runs_are_named_and_left_out(root: Path) -> None:
    change(root / "128x4-moe_4t4i-s0", lambda meta: meta.update(total_steps=400))
    shutil.rmtree(root / "128x4-moe_4t4i-s1/checkpoints")
    path = root / "128x4-moe_4t4i-s2/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:10]))
    study = read_study([str(root / "*")])
    assert {one.folder.name: one.reason for one in study.left_out} == {
        "128x4-moe_4t4i-s0": "stopped at step 300 of 400: run its command again",
        "128x4-moe_4t4i-s1": "no checkpoint: it stopped before its first one, run its command again",
        "128x4-moe_4t4i-s2": "metrics end at step 80, its checkpoint is of step 300: restore the file",
    }
    assert {run.variant for run in study.runs} == {"dense"}
    change(root / "128x4-dense-s0", lambda meta: meta.update(skipped=2))
    assert read_study([str(root / "*")]).notes == (
        "128x4-dense-s0 left out 2 of its steps, not finite: its skipped.jsonl names them.",
    )
    for seed in range(3):
        change(root / f"128x4-dense-s{seed}", lambda meta: meta.update(total_steps=400))
    with pytest.raises(ValueError, match=r"got no finished dense run .*stopped at step 300 of 400.*need the baseline"):
        read_study([str(root / "*")])


def test_a_base_that_routers_bring_along_counts_once_it_is_finished(sweep: dict, root: Path) -> None:
    experts, base = {"text": 4, "image": 4}, root / "128x4-moe_4t4i-s0"
    aux = sweep["write_run"](root / "aux", experts, 0, 12, 0, "aux_routers", base, shape=(128, 4), cost=1e7)
    dense = root / "128x4-dense-s0"
    sparse = read_study([dense, aux]).runs[1]
    assert sparse.name == base.name and sparse.routers is not None and final_flops(sparse.routers) > 0
    change(aux, lambda meta: meta.update(total_steps=500))
    study = read_study([dense, base, aux])
    assert study.runs[1].routers is None
    assert [one.reason for one in study.left_out] == [
        "its routers' training stopped at step 120 of 500: run its command again"
    ]
    change(aux, lambda meta: meta.update(total_steps=120))
    change(base, lambda meta: meta.update(total_steps=400))
    study = read_study([dense, aux])
    assert len(study.runs) == 1 and [one.folder.name for one in study.left_out] == [base.name]


def test_runs_on_other_data_are_refused_by_their_fields(root: Path) -> None:
    one = root / "128x4-moe_4t4i-s1"
    change(one, lambda meta: meta["config"].update(plan="another"))
    with pytest.raises(ValueError, match=r"with different plan \(plan of seed 1 and another\), need runs on the same"):
        read_study([str(root / "*")])
    change(one, lambda meta: meta["config"]["data"].update(rows=8, images=32))
    with pytest.raises(ValueError, match=r"different data.rows \(4 and 8\), data.images \(16 and 32\), need runs"):
        read_study([str(root / "*")])
    change(one, lambda meta: meta["config"].update(vocab_hash="f00"))
    with pytest.raises(ValueError, match=r"different vocab_hash \(0123456789abcdef and f00\).*leave one out"):
        read_study([str(root / "*")])


def test_seeds_without_a_pair_and_twins_are_named(root: Path) -> None:
    shutil.rmtree(root / "128x4-dense-s2")
    assert read_study([str(root / "*")]).notes == ("No dense run with the seeds of moe_4t4i, seed 2: in no pair.",)
    shutil.copytree(root / "128x4-dense-s0", root / "copy")
    with pytest.raises(ValueError, match="both dense with the same seeds"):
        read_study([str(root / "*")])


def test_paths_that_are_no_runs_are_refused(root: Path, tmp_path: Path) -> None:
    for pattern, text in {
        "gone": "got no folder .*gone, need one that `moma train` wrote: check the path",
        "gone/*": "which matches no run folder, need some",
        "runs": r"which is no run folder, need one with metrics.jsonl: name its runs, '.*runs/\*'",
    }.items():
        with pytest.raises(ValueError, match=text):
            run_folders([str(tmp_path / pattern)])
    with pytest.raises(ValueError, match="got no runs, need a dense and a sparse run folder"):
        run_folders([])
    with pytest.raises(ValueError, match="got no finished dense run among 128x4-moe_4t4i-s0, need the baseline"):
        read_study([root / "128x4-moe_4t4i-s0"])
    (root / "128x4-dense-s0/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="got no whole line in .*: train for longer"):
        read_study([root / "128x4-dense-s0"])


def test_a_sweep_stands_for_its_jobs(root: Path, tmp_path: Path) -> None:
    folders = [*sorted(map(str, root.iterdir())), str(tmp_path / "never")]
    jobs = [{"number": i, "folder": folder, "status": "finished"} for i, folder in enumerate(folders)]
    jobs[-1]["status"] = "failed 1: moma train: got nothing"
    record = tmp_path / "sweep/sweep.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"command": "moma train -m", "jobs": jobs}))
    study = read_study([record.parent])
    assert len(study.runs) == 6
    assert [(one.folder.name, one.reason) for one in study.left_out] == [
        ("never", "job 6: failed 1: moma train: got nothing")
    ]
    record.write_text("[]")
    with pytest.raises(ValueError, match=r"got a damaged .*sweep.json .*: run the sweep again"):
        read_study([record.parent])
