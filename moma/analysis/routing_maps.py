"""Routing maps of an eval.json as arrays ready to draw.

    share     one column per (expert, modality) that the expert may compute; rows are layers places    per
    layer and image expert, the picture's grid: the share of pictures at which it takes that place reliance  0
    (every place alike) to 1 (the place alone decides), per layer

Under expert choice (`train`) the load of an expert is constant by construction, so a modality's shares are
equal; what differs is which tokens it takes. Under the causal routers (`aux`) loads differ too. Refuses maps
whose parts do not fit together.
"""

from typing import Any, NamedTuple

import numpy as np

TEXT, IMAGE = "text", "image"


class Shares(NamedTuple):
    """`share`: (layers, columns), 0 to 1; `column`: (expert name, modality) of each; `fair`: 1 / experts in
    group.
    """

    share: np.ndarray
    column: list[tuple[str, str]]
    fair: np.ndarray


def group_of(expert: str) -> str:
    """`image` of `image 3`."""
    return expert.rsplit(" ", 1)[0]


def modes(maps: dict[str, Any]) -> list[str]:
    """Routing modes that the maps were made in, `train` first."""
    return sorted(maps["share"], key=lambda mode: mode != "train")


def shares(maps: dict[str, Any], mode: str) -> Shares:
    """Share of a modality's tokens that each expert computes, in one routing mode; raises ValueError."""
    modalities, experts = maps.get("modalities", [TEXT, IMAGE]), maps["experts"]
    table = np.array(maps["share"][mode], float)
    if table.ndim != 3 or table.shape[1:] != (len(experts), len(modalities)):
        raise ValueError(
            f"got shares of shape {table.shape}, need (layers, {len(experts)} experts, {len(modalities)} "
            "modalities): run moma evaluate again"
        )
    groups = [group_of(expert) for expert in experts]
    index = [
        (e, m)
        for group in dict.fromkeys(groups)
        for m, modality in enumerate(modalities)
        if group == modality or group not in modalities
        for e in range(len(experts))
        if groups[e] == group
    ]
    fair = np.array([1 / groups.count(groups[e]) for e, _ in index])
    return Shares(
        table[:, [e for e, _ in index], [m for _, m in index]],
        [(experts[e], modalities[m]) for e, m in index],
        fair,
    )


def image_experts(maps: dict[str, Any]) -> list[int]:
    """Columns of the experts that image tokens may go to."""
    others = [m for m in maps.get("modalities", [TEXT, IMAGE]) if m != IMAGE]
    return [e for e, name in enumerate(maps["experts"]) if group_of(name) not in others]


def places(maps: dict[str, Any], mode: str) -> np.ndarray:
    """Share of pictures at which an image expert takes a place: (layers, image experts, height, width)."""
    table = np.array(maps["image_position"][mode], float)
    height, width = maps["grid"]
    if table.ndim != 3 or table.shape[1:] != (len(maps["experts"]), height * width):
        raise ValueError(
            f"got image positions of shape {table.shape}, need (layers, {len(maps['experts'])} experts, "
            f"{height * width} places): run moma evaluate again"
        )
    return table[:, image_experts(maps)].reshape(len(table), -1, height, width)


def reliance(place: np.ndarray) -> np.ndarray:
    """How far an expert's choice follows the place alone: (layers,), 0 to 1.

    Per expert with share p(x) at place x and mean share q: mean |p(x) - q| over its largest possible value
    2 q (1 - q); then the mean over experts. Over n pictures, chance alone gives about sqrt(1 / (2 pi n q (1 - q))).
    """
    q = place.mean((2, 3), keepdims=True)
    most = 2 * q * (1 - q)
    spread = np.abs(place - q).mean((2, 3), keepdims=True)
    return np.divide(spread, most, out=np.zeros_like(spread), where=most > 0).mean((1, 2, 3))


def mosaic(place: np.ndarray, gap: int = 1) -> np.ndarray:
    """All grids in one array, layers downwards, experts across, NaN between them."""
    layers, experts, height, width = place.shape
    sheet = np.full((layers * (height + gap) - gap, experts * (width + gap) - gap), np.nan)
    for layer in range(layers):
        for expert in range(experts):
            top, left = layer * (height + gap), expert * (width + gap)
            sheet[top : top + height, left : left + width] = place[layer, expert]
    return sheet
