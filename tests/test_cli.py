"""What the command line prints and returns: help, one-line errors, interruption; what it does not import."""

import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moma import __version__, cli, config
from moma.config import VERBS, Composed, Verb


@dataclass(frozen=True)
class ToyConfig:
    dim: int


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb `toy` whose entry is `toy_verb.main`, to be set by the test."""
    (tmp_path / "model").mkdir()
    (tmp_path / "toy.yaml").write_text("defaults:\n  - model@_global_: tiny\n  - _self_\n")
    (tmp_path / "model/tiny.yaml").write_text("dim: 8\n")
    (tmp_path / "model/big.yaml").write_text("dim: 16\n")
    module = types.ModuleType("toy_verb")
    module.ToyConfig = ToyConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_verb", module)
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:ToyConfig", "toy_verb:main"))
    monkeypatch.setattr(config, "share", lambda name: tmp_path)
    return module


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text and entry.phrase in text for verb, entry in VERBS.items())
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_of_a_verb_shows_groups_and_defaults(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "--help"]) == 0
    text = capsys.readouterr().out
    assert "moma toy: a toy" in text and "big tiny*" in text and text.endswith("dim: 8\n")


def test_a_verb_gets_its_configuration_and_gives_the_exit_status(toy: Any, monkeypatch: Any) -> None:
    got: list = []
    toy.main = lambda composed: got.append(composed) or 3
    assert cli.main(["toy", "dim=4"]) == 3
    assert isinstance(got[0], Composed) and got[0].config == ToyConfig(4)
    monkeypatch.setitem(VERBS, "toy", VERBS["toy"]._replace(composed=False))
    assert cli.main(["toy", "dim=5"]) == 0
    assert got[1] == ToyConfig(5)


def _raise(error: BaseException) -> Any:
    def entry(composed: Composed) -> None:
        raise error

    return entry


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["toy"], ValueError("got 3, need 4: add 1"), "moma toy: got 3, need 4: add 1\n"),
        (
            ["toy"],
            FileNotFoundError(2, "No such file", "a.txt"),
            "moma toy: [Errno 2] No such file: 'a.txt'\n",
        ),
        (
            ["toy"],
            ModuleNotFoundError("x", name="plots"),
            "moma toy: got no package 'plots', need it here: run make",
        ),
        (["toy", "dmi=3"], None, "moma toy: got the unknown key dmi, need one that `moma toy --help` shows"),
        (["tyo"], None, "moma: got the verb 'tyo', need one of "),
        (["tyo"], None, "did you mean toy?\n"),
        (["qqqq"], None, ": see moma --help\n"),
        (
            ["toy", "-m", "dim=1,2"],
            None,
            "moma toy: got -m for toy, need one of train, upcycle, evaluate: start one command for each value",
        ),
        (
            ["toy", "--dim", "3"],
            None,
            "moma toy: got the flag --dim, need --help, --traceback or -m: settings are written",
        ),
    ],
)
def test_mistakes_are_one_line(toy: Any, capsys: Any, arguments: list[str], error: Any, message: str) -> None:
    toy.main = _raise(error)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_traceback_shows_the_origin_of_a_mistake(toy: Any) -> None:
    toy.main = _raise(ValueError("got 3"))
    with pytest.raises(ValueError, match="got 3"):
        cli.main(["toy", "--traceback"])


def test_a_programming_error_is_not_hidden(toy: Any) -> None:
    toy.main = _raise(KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["toy"])


def test_an_interrupted_run_says_how_to_go_on(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy.main = _raise(KeyboardInterrupt())
    assert cli.main(["toy"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command to go on\n"


def test_starting_up_imports_neither_torch_nor_wandb() -> None:
    script = (
        "import sys; from moma.cli import main; status = main(['--help']);"
        "assert not {'torch', 'torchtune', 'wandb', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_folders_can_be_given_without_their_key(monkeypatch: Any) -> None:
    given = ["runs/a", "out=x", "b c's"]
    assert cli._listed("compare", given) == ["out=x", "runs=['runs/a','b c\\'s']"]
    assert config.raw("report", cli._listed("compare", given))[0]["runs"] == ["runs/a", "b c's"]
    assert cli._listed("train", given) == given
