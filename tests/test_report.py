"""`moma report` from the command line: a page, its figures, and the verdict on the console."""

import json
import runpy
from pathlib import Path

import pytest

from moma.cli import main

write_study = runpy.run_path(str(Path(__file__).parent / "analysis" / "conftest.py"))["write_study"]


def paths(folders: list[Path]) -> str:
    return f"[{','.join(map(str, folders))}]"


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, out = write_study(tmp_path, lines=12, layers=2, samples=1), tmp_path / "study" / "report"
    out.parent.mkdir()
    record = {"stages": {"train dense": {"cpu_s": 5.0, "wall_s": 3.0, "command": "moma train feed_forward=dense"}}}
    (out.parent / "quickstart.json").write_text(json.dumps(record))
    dense, _, aux = study["runs"]
    arguments = [f"runs={paths([dense, aux])}", f"generations={paths(study['generations'])}", f"out={out}"]
    assert main(["report", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "moe_4t4i (aux) - dense (causal), image: -0.1900 nats; one seed: no verdict" in printed
    assert "eta of moe_4t4i (training loss, overall):" in printed
    assert f"wrote {out / 'report.html'}" in printed
    assert "moma train feed_forward=dense" in (out / "report.html").read_text()
    (out.parent / "quickstart.json").write_text("{")
    assert main(["report", *arguments]) == 2
    assert "need JSON: remove it" in capsys.readouterr().err


def test_runs_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "got no value for runs, need one" in capsys.readouterr().err
    assert main(["report", "runs=[]"]) == 2
    assert "got no runs, need at least one run folder: runs=[RUN,RUN]" in capsys.readouterr().err
    assert main(["report", f"runs=[{tmp_path}]"]) == 2
    assert "without a checkpoint" in capsys.readouterr().err
