"""metrics.jsonl is strict JSON with known names, and after a resume no step stands twice."""

import io
import json
import sys
import types
from pathlib import Path

import pytest

from moma.log import METRICS, LogConfig, Progress, RunLog


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, LogConfig(), {})
    log.metrics(0, {"loss": 3.0})
    log.metrics(1, {"loss": 2.5, "router/3/picks_text": 7})
    offset = log.offset()
    log.metrics(2, {"loss": 2.0})  # after the checkpoint: lost with the kill
    log.close()
    again = RunLog(tmp_path, LogConfig(), {}, offset=offset)
    again.metrics(2, {"loss": 2.0, "z_loss": float("nan"), "lr": float("inf"), "loss_image": None})
    again.close()
    assert lines(tmp_path) == [
        {"step": 0, "loss": 3.0},
        {"step": 1, "loss": 2.5, "router/3/picks_text": 7},
        {"step": 2, "loss": 2.0, "z_loss": None, "lr": None, "loss_image": None},
    ]
    with pytest.raises(ValueError, match=r"metrics.jsonl of \d+ bytes, need the 9999 of the checkpoint: restore"):
        RunLog(tmp_path, LogConfig(), {}, offset=9999)
    RunLog(tmp_path, LogConfig(), {}).close()  # a fresh start
    assert lines(tmp_path) == []


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    log = RunLog(tmp_path, LogConfig(), {})
    with pytest.raises(
        ValueError, match="got the metric 'grad_nrom', need one of log.METRICS: did you mean grad_norm?"
    ):
        log.metrics(0, {"grad_nrom": 1.0})
    with pytest.raises(ValueError, match="got the metric 'router/1/x/entropy', need one of"):
        log.metrics(0, {"router/1/x/entropy": 1.0})
    log.metrics(0, {name.format_map(AnyName()): 1.0 for name in METRICS})
    of_routers = ("unserved_text", "single_text", "several_text", "picks_text", "score_text", "entropy_text")
    of_routers += ("dropped_image", "grad_norm")
    log.metrics(1, {f"router/{router}/{what}": 1.0 for router in ("3", "3.depth") for what in of_routers})
    log.metrics(2, {name: 1.0 for name in ("aux/3.depth/accuracy", "aux_loss", "balance_loss", "router_z_loss")})
    log.close()


class AnyName(dict):
    def __missing__(self, key: str) -> str:
        return "x"


def test_every_metric_has_a_unit() -> None:
    assert all(": " in text for text in METRICS.values())


def test_other_ranks_write_nothing_but_check_names(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", LogConfig(kind="wandb"), {}, writes=False)
    log.metrics(0, {"loss": 1.0})
    assert log.offset() is None and not (tmp_path / "run").exists()
    log.close()


class NoAnswer(Exception):
    pass


def a_wandb(monkeypatch: pytest.MonkeyPatch, answers: tuple[str, ...] = ("offline", "online")) -> list:
    """Replace the package by one that takes down what it is asked for; it starts in the modes of `answers` alone."""
    calls: list = []
    run = types.SimpleNamespace(
        id="abc", log=lambda line, step: calls.append((step, line)), finish=lambda: calls.append("finish")
    )

    def init(**given: object) -> object:
        calls.append(given)
        if given["mode"] not in answers:
            raise NoAnswer("Timed out\nlong story")
        return run

    module = types.SimpleNamespace(init=init, Settings=dict, Error=NoAnswer, teardown=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_mirrors_the_file_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = a_wandb(monkeypatch)
    log = RunLog(tmp_path, LogConfig(kind="wandb", tags=("a",)), {"x": 1})
    log.metrics(4, {"loss": 1.0, "z_loss": float("nan")})
    log.close()
    assert log.wandb_id == "abc"
    assert calls[0]["mode"] == "offline" and calls[0]["config"] == {"x": 1} and calls[0]["resume"] is None
    assert calls[1:] == [(4, {"loss": 1.0}), "finish"]
    RunLog(tmp_path, LogConfig(kind="wandb"), {}, wandb_id="abc").close()
    assert (calls[3]["id"], calls[3]["resume"]) == ("abc", "allow")


def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = a_wandb(monkeypatch, answers=("offline",))
    RunLog(tmp_path, LogConfig(kind="wandb", mode="online"), {}, wandb_id="abc").close()
    assert [call["mode"] for call in calls[:2]] == ["online", "offline"] and calls[2:] == ["finish"]
    assert {call["id"] for call in calls[:2]} == {"abc"}
    assert calls[0]["settings"] == {
        "init_timeout": 30.0,
        "finish_timeout": 60.0,
    }
    said = capsys.readouterr().err
    assert "W&B does not answer (Timed out): the run is logged offline, `wandb sync" in said


def test_a_mirror_that_breaks_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_wandb(monkeypatch)
    log = RunLog(tmp_path, LogConfig(kind="wandb"), {})
    monkeypatch.setattr(log._wandb, "log", lambda line, step: 1 / 0)
    for step in (1, 2):
        log.metrics(step, {"loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("W&B gets no more numbers of this run (division by zero)") == 1


def test_a_wandb_that_cannot_start_at_all_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_wandb(monkeypatch, answers=())
    with pytest.raises(
        ValueError, match="got an error of W&B .Timed out[^,]*, need it to start: mend it, or set log=f"
    ):
        RunLog(tmp_path, LogConfig(kind="wandb"), {})


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match="got log.interval=0, need at least 1 step"):
        LogConfig(interval=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_on_a_terminal_and_prints_lines_elsewhere() -> None:
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress("train", 3, interval_s=1000, stream=stream)
        for done in (1, 2, 3):
            progress.update(done, f"loss {done}.0")
        progress.close()
    assert plain.getvalue().splitlines() == [
        "train 1/3 | loss 1.0 | 0 s left",
        "train 3/3 | loss 3.0 | 0 s left",
    ]
    assert terminal.getvalue().count("\r") == 2 and terminal.getvalue().count("\n") == 1
