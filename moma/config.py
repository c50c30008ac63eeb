"""Hydra in, frozen dataclasses out.

    conf/<verb>.yaml + groups + overrides  --Hydra-->  mapping  --schema.build-->  VerbConfig(...), frozen
    VERB -m key=a,b group=x,y              --Hydra's sweeper-->  overrides of every job  --launcher-->  task

YAML holds data only: no classes, no callables. It is read by OmegaConf alone, since plain PyYAML takes 1e-3
for a string. Two short forms are moma's own: `duration.steps=10` replaces a duration as a whole, and `seed=1` is
`seed.data=1 seed.init=1` where a verb has both. `${hydra:runtime.choices.model}` is the option chosen in a group.

Refuses what `moma/schema.py` refuses, and settings of Hydra itself: a verb has no Hydra job, so they would do nothing
(`multirun` takes those of its sweeper and launcher). Hydra's own hint for a mistyped key, to append it with "+", is
replaced by the key that was meant.
"""

import functools
import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moma.meter import Duration
from moma.schema import build, diff, kind_field, leaves, nearest, plain

__all__ = [
    "VERBS",
    "Composed",
    "Duration",
    "Verb",
    "build",
    "compose",
    "diff",
    "kind_field",
    "locate",
    "multirun",
    "options",
    "plain",
    "points",
    "quoted",
    "raw",
    "share",
]


_UNITS = ("steps", "tokens", "flops", "percent")
_UNIT = f"(?P<unit>{'|'.join(_UNITS)})"
# duration.steps=10 or duration={steps: 10}
_DURATION = re.compile(
    r"(?P<key>[\w.]+?)(\." + _UNIT + r"=|=\{\s*" + _UNIT.replace("unit", "unit2") + r"\s*:)\s*(?P<value>[^\s{}]+)\s*\}?"
)
_SEED = re.compile(r"seed=(-?\d+)")
_SWEEP_OWN = re.compile(r"hydra([./]launcher|\.sweeper\.(params|max_batch_size)|\.searchpath|\.sweep\.dir)\b")
_SWEEPS = "hydra.sweep.subdir=${hydra.job.num} hydra.output_subdir=null hydra/job_logging=none hydra/hydra_logging=none"


class Verb(NamedTuple):
    """`config` and `entry` are "module:name", imported on use, so that `moma --help` needs no torch.

    The entry takes a `Composed` where `composed` is set, else the configuration alone.
    """

    phrase: str
    config: str
    entry: str
    composed: bool = True


VERBS = {
    "quickstart": Verb("all of the below, small", "moma.quickstart:QuickstartConfig", "moma.quickstart:main"),
    "prepare": Verb("raw documents -> token shards", "moma.prepare:PrepareConfig", "moma.prepare:main"),
    "train_bpe": Verb("text tokenizer", "moma.train_bpe:TrainBpeConfig", "moma.train_bpe:train_bpe", False),
    "train_vq": Verb("image tokenizer", "moma.train_vq:TrainVqConfig", "moma.train_vq:train_vq", False),
    "train": Verb("pre-train a model, or its causal routers", "moma.run:TrainConfig", "moma.train:main"),
    "upcycle": Verb("seed checkpoint -> sparse checkpoint", "moma.upcycle:UpcycleConfig", "moma.upcycle:main"),
    "evaluate": Verb("checkpoint -> eval.json", "moma.evaluate:EvaluateConfig", "moma.evaluate:main"),
    "generate": Verb("checkpoint -> text and pictures", "moma.generate:GenerateConfig", "moma.generate:main"),
    "describe": Verb("parameters, FLOPs, memory", "moma.describe:DescribeConfig", "moma.describe:main"),
    "import_hf": Verb("Chameleon weights in", "moma.import_hf:ImportHfConfig", "moma.import_hf:main"),
    "export_hf": Verb("Chameleon weights out", "moma.export_hf:ExportHfConfig", "moma.export_hf:main"),
    "report": Verb("run folders -> tables and figures", "moma.report:ReportConfig", "moma.report:main"),
    "export": Verb("checkpoint -> one safetensors file", "moma.export:ExportConfig", "moma.export:main"),
    "bench": Verb("seconds, beside other systems", "moma.bench:BenchConfig", "moma.bench:main"),
    "compare": Verb("runs -> eta, scaling fits, tables, figures", "moma.compare:CompareConfig", "moma.compare:main"),
}
TWO_SEEDS = ("train", "upcycle")  # verbs whose `seed` is {data, init}


@dataclass(frozen=True)
class Composed:
    """One verb's configuration, the option chosen in each config group, the mapping for the records, and what the
    user gave."""

    config: Any
    choices: dict[str, str]
    resolved: dict[str, Any]
    overrides: tuple[str, ...] = ()


def share(name: str) -> Path:
    """The folder `conf` or `tokenizers`: at the top of a checkout, inside the package of a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_share" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"got an installation of moma without {name}/, need it beside the package: install it again")


def locate(target: str) -> Any:
    """The object behind "module:name"."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def compose(verb: str, overrides: list[str]) -> Composed:
    """The verb's configuration with Hydra overrides applied; a user's mistake is a ValueError of one line."""
    mapping, choices = raw(verb, overrides)
    config = build(locate(VERBS[verb].config), mapping)
    return Composed(config, choices, plain(config), tuple(overrides))


def raw(verb: str, overrides: list[str], complete: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Hydra's part of `compose`: the resolved mapping and the option chosen in each config group.

    `complete=False` leaves mandatory values that are not given as "???" (for help).
    """
    for override in overrides:
        if re.match(r"[+~]*hydra[./](?!searchpath=)", override):
            raise ValueError(f"got {override!r}, need a key of moma: of Hydra's own, only hydra.searchpath counts")
    overrides = [part for override in overrides for part in _seeds(verb, override)]
    durations = [found for override in overrides if (found := _DURATION.fullmatch(override))]
    rest = [override for override in overrides if not _DURATION.fullmatch(override)]
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        with initialize_config_dir(str(_home(verb)), version_base="1.3"):
            composed = hydra_compose(verb, rest, return_hydra_config=True)
        chosen = composed.hydra.runtime.choices.items()
        hydra.set_config(composed)  # for ${hydra:runtime.choices...}
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        unresolved = OmegaConf.to_container(own)
        for found in durations:
            _set_duration(unresolved, found)
        own = OmegaConf.create(cast(dict[str, Any], unresolved))
        mapping = OmegaConf.to_container(own, resolve=True, throw_on_missing=complete)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise ValueError(_explain(verb, overrides, str(error))) from error
    finally:
        hydra.cfg = before
    choices = {str(k): str(v) for k, v in chosen if v is not None and not str(k).startswith("hydra/")}
    return cast(dict[str, Any], mapping), choices


def multirun(verb: str, overrides: list[str], folder: Path, name: str, task: Callable[[int, list[str]], None]) -> None:
    """Call `task(number, overrides)` for every job of a sweep, wherever Hydra's launcher runs them (by default here,
    one after the other); it must be picklable then, and what it raises is lost.

    `folder`: for Hydra's multirun.yaml and one (empty) folder per job. Raises ValueError for a user's mistake, and
    whatever the launcher raises.
    """
    with _sweeping(verb, overrides, folder, name) as (hydra, given):
        hydra.multirun(verb, functools.partial(_job, task), given, with_log_configuration=False)


def points(verb: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in the order of their numbers, as `moma VERB` takes them.

    Nothing is composed but what all jobs share. Raises ValueError for a user's mistake.
    """
    found: list[list[str]] = []
    here = [override for override in overrides if not re.match(r"hydra([./]launcher|\.sweep\.dir)", override)]
    own = [override for override in here if override.startswith("hydra.searchpath=")]
    with tempfile.TemporaryDirectory() as folder, _sweeping(verb, here, Path(folder), "points") as (hydra, given):
        config = hydra.compose_config(verb, given, RunMode.MULTIRUN, with_log_configuration=False)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        sweeper = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=lambda config: None, config=config
        )
        sweeper.launcher = _Recorder(found)
        sweeper.validate_batch_is_legal = lambda batch: None  # every job is composed by the caller
        sweeper.sweep(cast(list[str], OmegaConf.to_container(config.hydra.overrides.task)))
    return [[*own, *map(_from_hydra, job)] for job in found]


class _Recorder(Launcher):
    """A launcher that notes the overrides of its jobs and starts none."""

    def __init__(self, found: list[list[str]]) -> None:
        self.found = found

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: Any) -> None:
        """Needs nothing."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """No results."""
        self.found.extend(map(list, job_overrides))
        return []


@contextmanager
def _sweeping(verb: str, overrides: list[str], folder: Path, name: str) -> Iterator[tuple[Any, list[str]]]:
    """Hydra at home in the verb's folder, and the overrides for its sweep: no logging, no folders but `folder`."""
    for override in overrides:
        if re.match(r"[+~]*hydra[./]", override) and not _SWEEP_OWN.match(override):
            raise ValueError(
                f"got {override!r}, need a key of moma, or hydra/launcher, hydra.launcher.KEY, hydra.sweeper.params, "
                "hydra.sweeper.max_batch_size, hydra.searchpath or hydra.sweep.dir: leave it out"
            )
    own = [*_SWEEPS.split(), f"hydra.job.name={quoted(name)}"]
    if not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        own.append(f"hydra.sweep.dir={quoted(str(folder))}")
    try:
        with initialize_config_dir(str(_home(verb)), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            yield hydra, [*own, *map(_for_hydra, overrides)]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(verb, overrides, str(error))) from error


def _job(task: Callable[[int, list[str]], None], config: Any) -> None:
    """What Hydra runs: its number and overrides of the job, given to `task`."""
    hydra = HydraConfig.get()
    given = cast(dict[str, list[str]], OmegaConf.to_container(hydra.overrides))  # ${...} in them is for the job
    own = [override for override in given["hydra"] if override.startswith("hydra.searchpath=")]
    task(int(hydra.job.num), [*own, *map(_from_hydra, given["task"])])


def _for_hydra(override: str) -> str:
    """A duration so that Hydra accepts it; the job's own command reads it as `raw` does."""
    found = _DURATION.fullmatch(override)
    return f"++{found['key']}.{found['unit'] or found['unit2']}={found['value']}" if found else override


def _from_hydra(override: str) -> str:
    return override[2:] if override.startswith("++") and _DURATION.fullmatch(override[2:]) else override


def quoted(text: str) -> str:
    """A value in Hydra's syntax that stands for this text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _seeds(verb: str, override: str) -> list[str]:
    found = _SEED.fullmatch(override) if verb in TWO_SEEDS else None
    return [f"seed.data={found[1]}", f"seed.init={found[1]}"] if found else [override]


def _set_duration(mapping: Any, found: re.Match[str]) -> None:
    """Replace a duration as a whole: Hydra would merge `{steps: 10}` into `{tokens: 1e6}` and leave both.

    A setting that has a unit's name but stands among others (`profile.steps`) is set like any.
    """
    *parents, name = found["key"].split(".")
    node = mapping
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    old = node.get(name, "") if isinstance(node, dict) else ""
    new = OmegaConf.to_container(OmegaConf.create(f"{found['unit'] or found['unit2']}: {found['value']}"))
    if isinstance(old, dict) and found["unit"] in old and not set(old) <= set(_UNITS):
        old.update(cast(dict[str, Any], new))
        return
    if not (old is None or (isinstance(old, dict) and set(old) <= set(_UNITS))):
        near = nearest(found["key"], [key.rsplit(".", 1)[0] for key in leaves(mapping)])
        raise ValueError(f"got the unknown duration {found['key']}, need one that `--help` shows{near}")
    assert isinstance(node, dict)
    node[name] = new


def options(group: str, verb: str = "train") -> list[str]:
    """The options of a verb's config group, by file name."""
    return sorted(path.stem for path in (_home(verb) / group.split("@")[0]).glob("*.yaml"))


def _home(verb: str) -> Path:
    """The folder of a verb's primary file and groups: those that read raw documents have one of their own."""
    raw_verbs = share("conf") / "raw"
    return raw_verbs if (raw_verbs / f"{verb}.yaml").is_file() else share("conf")


def _explain(verb: str, overrides: list[str], error: str) -> str:
    """Hydra's or OmegaConf's message as one line: got, need, do this."""
    if "hydra/launcher" in error and "Could not find" in error or "submitit_slurm" in error:
        given = [override for override in overrides if override.startswith("hydra/launcher=")]
        return (
            f"got {' '.join(given)}, need basic, or joblib or slurm with their packages: run pip install -c "
            "constraints.txt 'moma[sweep]'"
        )
    if found := re.search(r"Could not find '(.+)/(.+)'\n+Available options in '.*':\n((?:\t.*\n?)*)", error):
        group, option, names = found[1], found[2], found[3].split()
        return f"got {group}={option}, need one of {', '.join(names)}{nearest(option, names)}"
    if found := re.search(r"Could not override '([^']+)'", error):
        mapping, choices = raw(verb, [], complete=False)
        if found[1] in {**leaves(mapping), **mapping}:
            return f"got new keys for {found[1]}, need them one by one: +{found[1]}.NAME=VALUE"
        hint = nearest(found[1], [*leaves(mapping), *mapping, *choices])
        return f"got the unknown key {found[1]}, need one that `moma {verb} --help` shows{hint}"
    if found := re.search(r"Ambiguous value for argument '(.+)'", error):
        return f"got several values, {found[1]}, need one: -m runs one job for each, a list is key=[a,b]"
    if found := re.search(r"Missing mandatory value: (\S+)", error):
        key = re.search(r"full_key: (\S+)", error)
        # an interpolation names the value that is missing, its full key the one that asks for it
        path = key[1] if key and "resolving interpolation" not in error else found[1]
        return f"got no value for {path}, need one: add {path}=..."
    if "override" in error or "input '" in error:
        reason = error.split("\nSee ")[0].replace("\n", " ")
        return f"got {' '.join(overrides)} ({reason}), need key=value: quote special characters, key='\"a,b\"'"
    return f"got {' '.join([verb, *overrides])} ({' '.join(error.split())}), need what composes: change it"
