"""Plain mappings <-> frozen dataclasses, strictly: `build` in, `plain` out, `diff` between two records.

    {"dim": 64, "ffn": {"kind": "moe", "experts": 4}}   --build-->   Model(64, Moe(4))   --plain--> back

A dataclass lives beside the code it configures. A field of several kinds names them in its metadata,
`ffn: Dense | Moe = kind_field({"dense": Dense, "moe": Moe})`, and the mapping's `kind` picks one.
Refuses unknown keys (naming the nearest known one), missing keys, and values of another type: an int may
stand for a float and a string for a path, nothing else is converted. Imports nothing of moma, so every layer
may use it.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal


def kind_field(kinds: Mapping[str, type], **options: Any) -> Any:
    """A dataclass field whose mapping (or each one in its dict or tuple) picks its dataclass of `kinds` by
    `kind`.

    `options` go to `dataclasses.field`.
    """
    return dataclasses.field(metadata={"kinds": kinds}, **options)


def build(cls: type, mapping: Mapping[str, Any], where: str = "") -> Any:
    """An instance of the dataclass `cls` from a plain mapping; `where` is its dotted path in messages.

    Understands bool, int, float, str, Path, Literal, Any, `X | None` and other unions, tuples, dicts,
    dataclasses. Raises ValueError for an unknown or missing key, a wrong type, or what the dataclass itself
    refuses.
    """
    hints, known = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}
    at = f"{where}." if where else ""
    for key in mapping:
        if key not in known:
            hint = nearest(str(key), known) or f": remove it, or choose from {', '.join(known)}"
            raise ValueError(f"got the unknown key {at}{key}, need a field of {cls.__name__}{hint}")
    values = {}
    for name, field in known.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], f"{at}{name}", field.metadata.get("kinds"))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"got no {at}{name}, need {_words(hints[name])}: add {at}{name}=...")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def plain(value: Any, kinds: Mapping[str, type] | None = None) -> Any:
    """The mapping that `build` turns into this dataclass again, defaults filled in, ready for JSON."""
    if dataclasses.is_dataclass(value):
        names = [name for name, cls in (kinds or {}).items() if cls is type(value)]
        kind = {"kind": names[0]} if names else {}
        fields = (f for f in dataclasses.fields(value) if f.init)
        return kind | {f.name: plain(getattr(value, f.name), f.metadata.get("kinds")) for f in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item, kinds) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, kinds) for item in value]
    return str(value) if isinstance(value, Path) else value


def diff(old: Mapping[str, Any], new: Mapping[str, Any], identity: Iterable[str]) -> tuple[list[str], list[str]]:
    """Differences of two plain mappings as lines "optim.lr: 0.1 -> 0.2": those of the run's identity, the
    free ones.

    `identity`: dotted paths; each stands for everything below it too.
    """
    before, after = leaves(old), leaves(new)
    fixed, free = [], []
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path, "absent"), after.get(path, "absent")
        if a != b:
            belongs = any(path == root or path.startswith(f"{root}.") for root in identity)
            (fixed if belongs else free).append(f"{path}: {a} -> {b}")
    return fixed, free


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path; an empty mapping is a leaf."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        found |= leaves(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """ ": did you mean X?" for an error message, empty where nothing is close."""
    known = list(known)
    close = [path for path in known if path.endswith(f".{name}")] or difflib.get_close_matches(name, known, 1)
    return f": did you mean {close[0]}?" if close else ""


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file of at most `max_bytes`; ValueError for a missing file and for anything else."""
    if not path.is_file():
        raise ValueError(f"got no file {path}, need it: give the path to a complete download")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"got {path} of {size} bytes, need at most {max_bytes}: it is no file of this kind")
    try:
        stored = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {path} that is no JSON ({error}), need a whole file: copy it again") from error
    if not isinstance(stored, dict):
        raise ValueError(f"got {path} that holds a {type(stored).__name__}, need an object: copy the file again")
    return stored


def _value(hint: Any, raw: Any, where: str, kinds: Mapping[str, type] | None = None) -> Any:
    """`raw` as the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"got {where}={raw!r} ({type(raw).__name__}), need {_words(hint)}: change {where}")
    if origin in (typing.Union, types.UnionType):
        return _union(args, raw, where, kinds, wrong)
    if origin is dict and isinstance(raw, Mapping):
        return {key: _value(args[1], item, f"{where}.{key}", kinds) for key, item in raw.items()}
    if origin is tuple and isinstance(raw, list | tuple):
        each = args[:1] * len(raw) if args[-1] is ... else args
        if len(each) != len(raw):
            raise wrong
        return tuple(_value(h, item, f"{where}.{i}", kinds) for i, (h, item) in enumerate(zip(each, raw, strict=True)))
    if kinds and isinstance(raw, Mapping):
        return _kind(kinds, raw, where)
    if origin is Literal:
        if any(raw == option and type(raw) is type(option) for option in args):
            return raw
        names = [str(option) for option in args]
        close = nearest(str(raw), names) or f": change {where}"
        raise ValueError(f"got {where}={raw}, need one of {', '.join(names)}{close}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(raw, Mapping):
        return build(hint, raw, where)
    if hint is Path and isinstance(raw, str):
        return Path(raw).expanduser()
    if hint is float and type(raw) is int:
        return float(raw)
    if hint is Any or (hint in (bool, int, float, str) and type(raw) is hint):
        return raw
    raise wrong


def _union(members: tuple[Any, ...], raw: Any, where: str, kinds: Mapping[str, type] | None, wrong: ValueError) -> Any:
    if raw is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _value(members[0], raw, where, kinds)
    if kinds and isinstance(raw, Mapping):
        return _kind(kinds, raw, where)
    for member in members:
        try:
            return _value(member, raw, where)
        except ValueError as error:
            if isinstance(raw, Mapping) and dataclasses.is_dataclass(member):
                wrong = error  # a mapping was meant to be this one: its own message says more
    raise wrong


def _kind(kinds: Mapping[str, type], raw: Mapping[str, Any], where: str) -> Any:
    kind = str(raw.get("kind"))
    if kind not in kinds:
        hint = nearest(kind, kinds) or f": set {where}.kind"
        raise ValueError(f"got {where}.kind={kind}, need one of {', '.join(kinds)}{hint}")
    keep = "kind" in (field.name for field in dataclasses.fields(kinds[kind]))
    return build(kinds[kind], {key: item for key, item in raw.items() if key != "kind" or keep}, where)


def _words(hint: Any) -> str:
    """A type as a reader of the message knows it."""
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(hint))}"
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if typing.get_origin(hint) is tuple:
        return "a list of " + (f"{_words(args[0])}" if args[-1] is ... else ", ".join(map(_words, args)))
    if typing.get_origin(hint) is dict:
        return f"a mapping of names to {_words(args[1])}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
