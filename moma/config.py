"""Hydra in, frozen dataclasses out.

    conf/<verb>.yaml + groups + overrides  --Hydra-->  mapping  --schema.build-->  VerbConfig(...), frozen

YAML holds data only: no classes, no callables. It is read by OmegaConf alone, since plain PyYAML takes 1e-3
for a string. Refuses what `moma/schema.py` refuses, and settings of Hydra itself: a verb has no Hydra job, so
they would do nothing. Hydra's own hint for a mistyped key, to append it with "+", is replaced by the key that
was meant.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
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
    "options",
    "plain",
    "raw",
    "share",
]


_UNITS = ("steps", "tokens", "flops", "percent")
_UNIT = f"(?P<unit>{'|'.join(_UNITS)})"
# duration.steps=10 or duration={steps: 10}
_DURATION = re.compile(
    r"(?P<key>[\w.]+?)(\." + _UNIT + r"=|=\{\s*" + _UNIT.replace("unit", "unit2") + r"\s*:)\s*(?P<value>[^\s{}]+)\s*\}?"
)


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
    "train": Verb("pre-train a model, or its causal routers", "moma.train:TrainConfig", "moma.train:main"),
    "upcycle": Verb("seed checkpoint -> sparse checkpoint", "moma.upcycle:UpcycleConfig", "moma.upcycle:main"),
    "evaluate": Verb("checkpoint -> eval.json", "moma.evaluate:EvaluateConfig", "moma.evaluate:main"),
    "generate": Verb("checkpoint -> text and pictures", "moma.generate:GenerateConfig", "moma.generate:main"),
    "describe": Verb("parameters, FLOPs, memory", "moma.describe:DescribeConfig", "moma.describe:main"),
    "import_hf": Verb("Chameleon weights in", "moma.import_hf:ImportHfConfig", "moma.import_hf:main"),
    "export_hf": Verb("Chameleon weights out", "moma.export_hf:ExportHfConfig", "moma.export_hf:main"),
    "report": Verb("run folders -> tables and figures", "moma.report:ReportConfig", "moma.report:main"),
}


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
    durations = [found for override in overrides if (found := _DURATION.fullmatch(override))]
    rest = [override for override in overrides if not _DURATION.fullmatch(override)]
    try:
        with initialize_config_dir(str(_home(verb)), version_base="1.3"):
            composed = hydra_compose(verb, rest, return_hydra_config=True)
        chosen = composed.hydra.runtime.choices.items()
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        mapping = OmegaConf.to_container(own, resolve=True, throw_on_missing=complete)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise ValueError(_explain(verb, overrides, str(error))) from error
    choices = {str(k): str(v) for k, v in chosen if v is not None and not str(k).startswith("hydra/")}
    for found in durations:
        _set_duration(mapping, found)
    return cast(dict[str, Any], mapping), choices


def _set_duration(mapping: Any, found: re.Match[str]) -> None:
    """Replace a duration as a whole: Hydra would merge `{steps: 10}` into `{tokens: 1e6}` and leave both."""
    *parents, name = found["key"].split(".")
    node = mapping
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    old = node.get(name, "") if isinstance(node, dict) else ""
    if not (old is None or (isinstance(old, dict) and set(old) <= set(_UNITS))):
        near = nearest(found["key"], [key.rsplit(".", 1)[0] for key in leaves(mapping)])
        raise ValueError(f"got the unknown duration {found['key']}, need one that `--help` shows{near}")
    assert isinstance(node, dict)
    node[name] = OmegaConf.to_container(OmegaConf.create(f"{found['unit'] or found['unit2']}: {found['value']}"))


def options(group: str, verb: str = "train") -> list[str]:
    """The options of a verb's config group, by file name."""
    return sorted(path.stem for path in (_home(verb) / group.split("@")[0]).glob("*.yaml"))


def _home(verb: str) -> Path:
    """The folder of a verb's primary file and groups: those that read raw documents have one of their own."""
    raw_verbs = share("conf") / "raw"
    return raw_verbs if (raw_verbs / f"{verb}.yaml").is_file() else share("conf")


def _explain(verb: str, overrides: list[str], error: str) -> str:
    """Hydra's or OmegaConf's message as one line: got, need, do this."""
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
        return f"got several values, {found[1]}, need one: start one command for each; a list is key=[a,b]"
    if found := re.search(r"Missing mandatory value: (\S+)", error):
        key = re.search(r"full_key: (\S+)", error)
        # an interpolation names the value that is missing, its full key the one that asks for it
        path = key[1] if key and "resolving interpolation" not in error else found[1]
        return f"got no value for {path}, need one: add {path}=..."
    if "override" in error or "input '" in error:
        reason = error.split("\nSee ")[0].replace("\n", " ")
        return f"got {' '.join(overrides)} ({reason}), need key=value: quote special characters, key='\"a,b\"'"
    return f"got {' '.join([verb, *overrides])} ({' '.join(error.split())}), need what composes: change it"
