"""Routing of an eval.json as arrays ready to draw: rows are layers that have a router, columns its experts.

    share     one column per (expert, modality) that the expert may compute
    places    per layer and expert of image tokens, the picture's grid: the share of pictures at which it takes a place
    reliance  0 (every place alike) to 1 (the place alone decides), per layer

Layers may differ: what a layer lacks is NaN. A depth router is one more column, `depth`, or one per modality. Under
expert choice (`train`) the load of an expert is constant by construction, so a modality's shares are equal; what
differs is which tokens it takes. Under causal rules loads differ too. Files of older versions, one list over layers of
equal routers, are read as well. Refuses maps whose parts do not fit together.
"""

from typing import Any, NamedTuple

import numpy as np

TEXT, IMAGE, DEPTH = "text", "image", "depth"


class Shares(NamedTuple):
    """`share`: (layers, columns), 0 to 1, NaN where the layer lacks the column; `column`: (expert name, modality) of
    each; `fair`: (layers, columns), the share by design; `layer`: numbers of the layers."""

    share: np.ndarray
    column: list[tuple[str, str]]
    fair: np.ndarray
    layer: list[int]


class Places(NamedTuple):
    """`place`: (layers, experts, height, width), 0 to 1, NaN where the layer lacks the expert."""

    place: np.ndarray
    expert: list[str]
    layer: list[int]


def group_of(expert: str) -> str:
    """`image` of `image 3`, `depth` of `depth` and of `depth image`."""
    return expert.split(" ")[0]


def layer_of(router: str) -> int:
    """3 of `3` and of `3.depth`."""
    return int(router.split(".")[0])


def routers(maps: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Maps per router, in the form of today."""
    if "routers" in maps:
        return maps["routers"]
    groups = [group_of(expert) for expert in maps["experts"]]
    found = {}
    for layer in range(max((len(rows) for rows in maps["share"].values()), default=0)):
        found[str(layer)] = {"columns": maps["experts"], "expected": [1 / groups.count(group) for group in groups]}
        for field in ("share", "image_position"):
            found[str(layer)][field] = {mode: rows[layer] for mode, rows in maps.get(field, {}).items()}
        found[str(layer)]["top_tokens"] = maps["top_tokens"][layer] if maps.get("top_tokens") else []
    return found


def agreement(routing: dict[str, Any]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """What an eval.json holds of its causal rules, by states, router and rule, in the form of today."""
    return {
        states: {str(n): {"aux": entry} for n, entry in enumerate(found)} if isinstance(found, list) else found
        for states, found in routing.items()
    }


def modes(maps: dict[str, Any]) -> list[str]:
    """Routing modes that the maps were made in, `train` first."""
    found = dict.fromkeys(mode for router in routers(maps).values() for mode in router["share"])
    return sorted(found, key=lambda mode: mode != "train")


def shares(maps: dict[str, Any], mode: str) -> Shares:
    """Share of a modality's tokens that each expert computes, in one routing mode; raises ValueError."""
    modalities, found = maps.get("modalities", [TEXT, IMAGE]), routers(maps)
    value: dict[tuple[int, str, str], tuple[float, float]] = {}
    for name, router in found.items():
        table = np.array(router["share"][mode], float)
        if table.shape != (len(router["columns"]), len(modalities)):
            raise ValueError(
                f"got shares of shape {table.shape} for router {name}, need ({len(router['columns'])} experts, "
                f"{len(modalities)} modalities): run moma evaluate again"
            )
        for e, expert in enumerate(router["columns"]):
            for m, modality in enumerate(modalities):
                if _may_compute(expert, modality, modalities):
                    value[layer_of(name), expert, modality] = table[e, m], router["expected"][e]
    experts = _in_order({expert for _, expert, _ in value}, modalities)
    groups = list(dict.fromkeys(map(group_of, experts)))
    column = [
        (expert, modality)
        for group in groups
        for modality in modalities
        for expert in experts
        if group_of(expert) == group and _may_compute(expert, modality, modalities)
    ]
    layer = sorted({layer for layer, _, _ in value})
    both = np.array([[value.get((row, *pair), (np.nan, np.nan)) for pair in column] for row in layer])
    both = both.reshape(len(layer), len(column), 2)
    return Shares(both[..., 0], column, both[..., 1], layer)


def places(maps: dict[str, Any], mode: str) -> Places:
    """Share of pictures at which an expert that image tokens may go to takes a place; raises ValueError."""
    modalities, (height, width) = maps.get("modalities", [TEXT, IMAGE]), maps["grid"]
    value = {}
    for name, router in routers(maps).items():
        table = np.array(router["image_position"][mode], float)
        if table.shape != (len(router["columns"]), height * width):
            raise ValueError(
                f"got image positions of shape {table.shape} for router {name}, need ({len(router['columns'])} "
                f"experts, {height * width} places): run moma evaluate again"
            )
        for e, expert in enumerate(router["columns"]):
            if _may_compute(expert, IMAGE, modalities):
                value[layer_of(name), expert] = table[e].reshape(height, width)
    expert = _in_order({expert for _, expert in value}, modalities)
    layer = sorted({layer for layer, _ in value})
    place = np.full((len(layer), len(expert), height, width), np.nan)
    for (row, name), grid in value.items():
        place[layer.index(row), expert.index(name)] = grid
    return Places(place, expert, layer)


def _may_compute(expert: str, modality: str, modalities: list[str]) -> bool:
    """Whether tokens of the modality may go to the expert; `mixed 3` and `depth` take all."""
    named = [word for word in expert.split(" ") if word in modalities]
    return not named or modality in named


def _in_order(experts: set[str], modalities: list[str]) -> list[str]:
    """By modality and number, depth last."""

    def key(expert: str) -> tuple[bool, int, int]:
        last = expert.split(" ")[-1]
        named = [i for i, modality in enumerate(modalities) if modality in expert.split(" ")]
        return group_of(expert) == DEPTH, named[0] if named else 0, int(last) if last.isdigit() else 0

    return sorted(experts, key=key)


def reliance(place: np.ndarray) -> np.ndarray:
    """How far an expert's choice follows the place alone: (layers,), 0 to 1; NaN for a layer without experts.

    Per expert with share p(x) at place x and mean share q: mean |p(x) - q| over its largest possible value
    2 q (1 - q); then the mean over experts. Over n pictures, chance alone gives about sqrt(1 / (2 pi n q (1 - q))).
    """
    q = place.mean((2, 3), keepdims=True)
    most = 2 * q * (1 - q)
    spread = np.abs(place - q).mean((2, 3), keepdims=True)
    every = np.divide(spread, most, out=np.zeros_like(spread), where=~(most <= 0))[:, :, 0, 0]
    known = np.isfinite(every)
    return np.where(known, every, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def mosaic(place: np.ndarray, gap: int = 1) -> np.ndarray:
    """All grids in one array, layers downwards, experts across, NaN between them."""
    layers, experts, height, width = place.shape
    sheet = np.full((layers * (height + gap) - gap, experts * (width + gap) - gap), np.nan)
    for layer in range(layers):
        for expert in range(experts):
            top, left = layer * (height + gap), expert * (width + gap)
            sheet[top : top + height, left : left + width] = place[layer, expert]
    return sheet
