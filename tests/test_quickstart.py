"""The quick start's commands are valid, are run once, and a failure is named."""

import json

import pytest

from moma import quickstart
from moma.config import compose
from moma.quickstart import Stage


def test_every_command_composes():
    config = compose("quickstart", []).config
    stages = [stage for together in quickstart.stages(config) for stage in together]
    assert {stage.kind for stage in stages} == set(config.budget)
    assert sum(config.budget.values()) <= 20
    for stage in stages:
        verb, *overrides = stage.arguments
        compose(verb, overrides)


def test_a_stage_runs_once_and_its_time_is_kept(tmp_path, capfd):
    record, path = {"stages": {}}, tmp_path / "quickstart.json"
    stage = Stage("prepare", "the rest", ("prepare", "--help"))
    quickstart.run_stages((stage,), record, path)
    first = json.loads(path.read_text())["stages"]["prepare"]
    assert first["done"] == "moma prepare --help" and first["cpu_s"] > 0
    quickstart.run_stages((stage,), record, path)
    out = capfd.readouterr().out
    assert out.count("settings (key.key=value):") == 1 and "[prepare] done before" in out
    assert json.loads(path.read_text())["stages"]["prepare"] == first
    other = stage._replace(arguments=("prepare", "tokenizer=openstax16k", "--help"))
    quickstart.run_stages((other,), record, path)
    assert capfd.readouterr().out.count("settings (key.key=value):") == 1  # another command is run


def test_a_failing_stage_stops_with_its_command(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"got exit code 2 from `moma describe model=91m`, need 0"):
        stage = Stage("describe", "the rest", ("describe", "model=91m"))
        quickstart.run_stages((stage,), {"stages": {}}, tmp_path / "quickstart.json")
    assert "need one of 1_4b, 1_4b_mod, 435m, 435m_mod, 90m, 90m_mod, micro, tiny, tiny_mod" in capfd.readouterr().err


def test_stages_side_by_side_are_told_apart(tmp_path, capfd):
    record = {"stages": {}}
    pair = tuple(Stage(name, "the rest", (name, "--help")) for name in ("prepare", "train_bpe"))
    quickstart.run_stages(pair, record, tmp_path / "quickstart.json")
    lines = capfd.readouterr().out.splitlines()
    for name in ("prepare", "train_bpe"):
        assert any(line.startswith(f"[{name}] moma {name}: ") for line in lines)
        assert record["stages"][name]["done"] == f"moma {name} --help"


def test_budget_is_printed_per_kind(tmp_path, capsys):
    config = compose("quickstart", []).config
    quickstart.print_budget({"stages": {"a": {"kind": "prepare", "cpu_s": 30.0}}}, config)
    assert "prepare            0.5 of" in capsys.readouterr().out


def test_other_lengths_need_another_folder(tmp_path):
    (tmp_path / "quickstart.json").write_text(json.dumps({"stages": {}, "config": {"tokens": 1.0}}))
    with pytest.raises(ValueError, match="got .* which holds .*need the same to go on: choose another out"):
        quickstart.main(compose("quickstart", [f"out={tmp_path}"]))


@pytest.mark.parametrize(("step", "finished"), [(3, False), (8, True)])
def test_a_training_that_stopped_early_is_not_finished(tmp_path, step, finished):
    folder = tmp_path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"step": step, "total_steps": 8}))
    stage = Stage("train", "train dense", ("train", f"run_dir={tmp_path}"))
    assert quickstart._finished(stage) is finished
    assert quickstart._finished(stage._replace(arguments=("evaluate", "run=x")))
