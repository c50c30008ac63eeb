"""Plain mappings become dataclasses or a message that names the key; Hydra's errors become one line."""

import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moma import config
from moma.config import VERBS, Duration, Verb, build, compose, diff, kind_field, plain, points, raw, share
from moma.trace import ProfileConfig


@dataclass(frozen=True)
class Dense:
    width: int = 8


@dataclass(frozen=True)
class Moe:
    experts: dict[str, int]
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.experts:
            raise ValueError("got no experts, need at least one: add a group")


@dataclass(frozen=True)
class Model:
    dim: int
    ffn: Dense | Moe = kind_field({"dense": Dense, "moe": Moe})
    norm: Literal["pre", "swin"] = "pre"
    grid: tuple[int, int] = (8, 8)


@dataclass(frozen=True)
class ToyConfig:
    model: Model
    lr: float
    out: Path = Path("runs")
    name: str | None = None
    tags: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Dense | Moe] = kind_field({"dense": Dense, "moe": Moe}, default_factory=dict)
    every: int | Duration = 10
    free: Any = None
    fast: bool = False


MAPPING: dict[str, Any] = {
    "model": {"dim": 64, "ffn": {"kind": "moe", "experts": {"text": 4}}, "norm": "swin", "grid": [4, 4]},
    "lr": 1,
    "out": "somewhere",
    "name": "x",
    "tags": ["a", "b"],
    "weights": {"a": 1, "b": 0.5},
    "parts": {"one": {"kind": "dense", "width": 3}},
    "every": {"percent": 5},
    "free": {"any": [1, None]},
    "fast": True,
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """MAPPING with one dotted key replaced."""
    head, _, rest = path.partition(".")

    def put(mapping: dict[str, Any], key: str, rest: str) -> dict[str, Any]:
        if not rest:
            return mapping | {key: value}
        head, _, tail = rest.partition(".")
        return mapping | {key: put(mapping.get(key, {}), head, tail)}

    return put(MAPPING, head, rest)


def test_build_fills_nested_dataclasses_and_plain_goes_back() -> None:
    built = build(ToyConfig, MAPPING)
    assert built == ToyConfig(
        model=Model(64, Moe({"text": 4}), "swin", (4, 4)),
        lr=1.0,
        out=Path("somewhere"),
        name="x",
        tags=("a", "b"),
        weights={"a": 1.0, "b": 0.5},
        parts={"one": Dense(3)},
        every=Duration(percent=5),
        free={"any": [1, None]},
        fast=True,
    )
    assert isinstance(built.lr, float) and isinstance(built.weights["a"], float)
    assert build(ToyConfig, plain(built)) == built
    assert plain(built)["model"]["ffn"] == {"kind": "moe", "experts": {"text": 4}, "noise": 0.0}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.dmi", 3, "got the unknown key model.dmi, need a field of Model: did you mean dim?"),
        (
            "zzz",
            3,
            "got the unknown key zzz, need a field of ToyConfig: remove it, or choose from model, lr, out",
        ),
        ("model.dim", "64", "got model.dim='64' (str), need int: change model.dim"),
        ("model.dim", 64.0, "got model.dim=64.0 (float), need int: change model.dim"),
        ("model.dim", True, "got model.dim=True (bool), need int: change model.dim"),
        ("model.dim", None, "got model.dim=None (NoneType), need int"),
        ("fast", 1, "got fast=1 (int), need bool"),
        ("name", 5, "got name=5 (int), need str: change name"),
        ("model.norm", "swim", "got model.norm=swim, need one of pre, swin: did you mean swin?"),
        ("model.grid", [4], "got model.grid=[4] (list), need a list of int, int"),
        ("model.grid", [4, "x"], "got model.grid.1='x' (str), need int"),
        ("tags", "a", "got tags='a' (str), need a list of str"),
        ("weights.a", "x", "got weights.a='x' (str), need float"),
        ("weights", [1], "got weights=[1] (list), need a mapping of names to float"),
        ("model", 3, "got model=3 (int), need a mapping of dim, ffn, norm, grid: change model"),
        ("model.ffn.kind", "meo", "got model.ffn.kind=meo, need one of dense, moe: did you mean moe?"),
        ("model.ffn", {}, "got model.ffn.kind=None, need one of dense, moe: set model.ffn.kind"),
        (
            "model.ffn",
            {"kind": "dense", "experts": 8},
            "got the unknown key model.ffn.experts, need a field of Dense",
        ),
        ("model.ffn.experts", {}, "model.ffn: got no experts, need at least one: add a group"),
        (
            "model.ffn",
            {"kind": "moe"},
            "got no model.ffn.experts, need a mapping of names to int: add model.ffn",
        ),
        ("parts.one.width", "w", "got parts.one.width='w' (str), need int"),
        ("every", "often", "got every='often' (str), need int or a mapping of steps, tokens, flops, percent"),
        (
            "every",
            {"steps": 1, "tokens": 2},
            "every: got a duration with ['steps', 'tokens'], need exactly one of",
        ),
    ],
)
def test_build_names_the_key_and_what_it_needs(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(ToyConfig, changed(path, value))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_diff_splits_identity_from_the_rest() -> None:
    old = {"model": {"dim": 64, "norm": "pre"}, "models": 1, "log": {"every": 1}}
    new = {"model": {"dim": 96, "norm": "pre", "bias": True}, "models": 2, "log": {"every": 5}}
    assert diff(old, new, ("model",)) == (
        ["model.bias: absent -> True", "model.dim: 64 -> 96"],
        ["log.every: 1 -> 5", "models: 1 -> 2"],
    )
    assert diff(old, old, ("model",)) == ([], [])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A verb `toy` with a group `model`, an empty group and an `experiment`."""
    files = {
        "toy.yaml": "defaults: [model: tiny, _self_, optional experiment: null]\nlr: 1e-3\nfree: ${model.dim}\n",
        "model/tiny.yaml": "dim: 8\nffn: {kind: dense}\n",
        "model/big.yaml": "dim: 16\nffn: {kind: moe, experts: {text: 4}}\n",
        "experiment/e1.yaml": "# @package _global_\ndefaults:\n  - override /model: big\nlr: 2e-3\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    module = types.ModuleType("toy_verb")
    module.ToyConfig = ToyConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_verb", module)
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:ToyConfig", "toy_verb:main"))
    monkeypatch.setattr(config, "share", lambda name: tmp_path)
    return tmp_path


def test_compose_builds_the_dataclass_and_records_choices(toy: Path) -> None:
    composed = compose("toy", ["model.dim=12", "+name=x"])
    assert composed.config == ToyConfig(model=Model(12, Dense()), lr=1e-3, name="x", free=12)
    assert composed.choices == {"model": "tiny"}
    assert composed.resolved == plain(composed.config) and composed.resolved["out"] == "runs"
    composed = compose("toy", ["experiment=e1"])
    assert composed.config.model == Model(16, Moe({"text": 4})) and composed.config.lr == 2e-3
    assert composed.choices == {"model": "big", "experiment": "e1"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=bgi", "got model=bgi, need one of big, tiny: did you mean big?"),
        (
            "modle=big",
            "got the unknown key modle, need one that `moma toy --help` shows: did you mean model?",
        ),
        (
            "model.dmi=3",
            "got the unknown key model.dmi, need one that `moma toy --help` shows: did you mean model.dim?",
        ),
        ("dim=3", "got the unknown key dim, need one that `moma toy --help` shows: did you mean model.dim?"),
        ("+nmae=3", "got the unknown key nmae, need a field of ToyConfig: did you mean name?"),
        ("lr=1,2", "got several values, lr=1,2, need one: -m runs one job for each, a list is key=[a,b]"),
        (
            "lr=[1",
            "got lr=[1 (no viable alternative at input '[1'), need key=value: quote special characters",
        ),
        ("lr", "need key=value: quote special characters"),
        ("lr=???", "got no value for lr, need one: add lr=..."),
        ("lr=${foo}", "got toy lr=${foo} (Interpolation key 'foo' not found full_key: lr"),
        ("lr=x", "got lr='x' (str), need float: change lr"),
        ("~lr", "got no lr, need float: add lr=..."),
        (
            "hydra.run.dir=x",
            "got 'hydra.run.dir=x', need a key of moma: of Hydra's own, only hydra.searchpath counts",
        ),
        ("hydra/launcher=basic", "got 'hydra/launcher=basic', need a key of moma"),
    ],
)
def test_hydra_errors_are_one_line(toy: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose("toy", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_seed_stands_for_both_and_choices_can_be_named() -> None:
    folder = "run_dir='r/${hydra:runtime.choices.feed_forward}-${optim.lr}-${duration.steps}-${seed.init}'"
    got = raw("train", ["seed=3", folder, "feed_forward=moe_8x", "duration.steps=70", "optim.lr=1e-3"])[0]
    assert got["seed"] == {"data": 3, "init": 3} and got["run_dir"] == "r/moe_8x-0.001-70-3"
    assert raw("train", ["seed=3", "seed.data=-1"])[0]["seed"] == {"data": -1, "init": 3}
    assert raw("generate", ["seed=3", "run=x"])[0]["seed"] == 3  # it has one only


def test_a_sweep_is_the_overrides_of_its_jobs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert points("toy", ["model=tiny,big", "lr=1,2"]) == [
        [f"model={model}", f"lr={lr}"] for model in ("tiny", "big") for lr in (1, 2)
    ]
    (toy / "experiment/e2.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {model.dim: '3,4', lr: '1,2'}}}\nlr: 3e-3\n"
    )
    assert points("toy", ["experiment=e2", "lr=5"]) == [[f"model.dim={n}", "lr=5", "experiment=e2"] for n in (3, 4)]
    with pytest.raises(ValueError, match=r"got 'hydra.run.dir=x', need a key of moma, or hydra/launcher, "):
        points("toy", ["hydra.run.dir=x"])


def test_durations_and_interpolations_of_a_sweep_reach_its_jobs() -> None:
    folder = "run_dir=runs/${optim.lr}-s${seed.init}"
    jobs = points("train", ["seed=0,1", folder, "eval.interval.steps=4,5", "duration={tokens: 1e6}"])
    assert (
        len(jobs) == 4
        and jobs[3][0] == "seed=1"
        and jobs[3][2:] == ["eval.interval.steps=5", "duration.tokens=1000000.0"]
    )
    got = raw("train", jobs[3])[0]
    assert (got["run_dir"], got["eval"]["interval"], got["duration"]) == ("runs/0.01-s1", {"steps": 5}, {"tokens": 1e6})


def test_a_launcher_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="got hydra/launcher=cloud, need basic, or joblib or slurm with their packages"
    ):
        config.multirun("train", ["hydra/launcher=cloud"], tmp_path, "x", print)


def test_a_search_path_adds_options(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    extra = tmp_path_factory.mktemp("mine")
    (extra / "model").mkdir()
    (extra / "model/mine.yaml").write_text("dim: 3\nffn: {kind: dense}\n")
    assert compose("toy", [f"hydra.searchpath=[file://{extra}]", "model=mine"]).config.model.dim == 3


def test_a_missing_share_is_named() -> None:
    assert share("conf").is_dir()
    with pytest.raises(ValueError, match="without nothing/, need it beside the package: install it again"):
        share("nothing")


def _ready(verb: str) -> bool:
    module = VERBS[verb].config.split(":")[0]
    return (
        any((share("conf") / place / f"{verb}.yaml").exists() for place in ("", "raw"))
        and importlib.util.find_spec(module) is not None
    )


@pytest.mark.parametrize("verb", [verb for verb in VERBS if _ready(verb)])
def test_the_defaults_of_a_verb_fill_its_dataclass(verb: str) -> None:
    try:
        composed = compose(verb, [])
    except ValueError as error:  # a verb may insist on an answer, such as which run
        assert "got no value for" in str(error)
    else:
        assert build(type(composed.config), composed.resolved) == composed.config
        assert config.locate(VERBS[verb].entry)


def test_a_mandatory_folder_is_asked_for_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"got no value for folder, need one: add folder=\.\.\."):
        compose("prepare", ["data=openstax256"])


def test_a_setting_with_the_name_of_a_unit_is_no_duration():
    assert compose("train", ["profile.steps=3"]).config.profile == ProfileConfig(start=10, steps=3)
    with pytest.raises(ValueError, match="got the unknown duration profil, need one that `--help` shows: did you mean"):
        compose("train", ["profil.steps=3"])
