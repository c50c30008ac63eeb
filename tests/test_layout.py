"""The top level is given, and the folders conf/ and tokenizers/ hold data only."""

import importlib.util
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import moma

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    *("moma", "conf", "tokenizers", "experiments", "tests"),
    *("pyproject.toml", "README.md", "constraints.txt", "Makefile", "LICENSE", "CONTRIBUTING.md"),
    *(".ci", ".gitignore", ".gitattributes"),
}


@pytest.mark.parametrize("folder", ["conf", "tokenizers"])
def test_data_folders_hold_no_python(folder: str) -> None:
    assert not list((ROOT / folder).rglob("*.py")), f"{folder}/ would become a package and shadow one of that name"


def test_the_tokenizers_folder_shadows_no_package() -> None:
    spec = importlib.util.find_spec("tokenizers")
    if spec is not None and spec.origin is not None:  # without PyPI's package, our folder is an empty namespace
        assert not Path(spec.origin).resolve().is_relative_to(ROOT / "tokenizers")


def test_the_top_level_holds_the_agreed_names_only() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {name.split("/")[0] for name in listed} - TOP == set()


def test_every_code_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "moma").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_the_version_stands_in_one_way_in_both_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == moma.__version__


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {_name(entry) for entry in wanted}
    assert names - {_name(entry) for entry in pinned} == set()


def _name(entry: str) -> str:
    for separator in ("[", ">", "=", "<", " "):
        entry = entry.split(separator)[0]
    return entry.lower().replace("_", "-")
