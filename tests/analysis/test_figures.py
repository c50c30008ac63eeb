"""Every figure draws, has README width, solid white ground and the same bytes each time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma.analysis import figures
from moma.analysis.runs import collect
from moma.analysis.speedup import Interval, held_out


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_figures_draw_at_readme_width(study: dict, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    found = runs[1].eval
    assert found is not None
    square = Image.new("RGB", (64, 64), "navy")
    entry = figures.Picture("costs $5 & $^{", square, {"dense": [square], "moe_4t4i": [square, square]})
    rows = held_out(runs)
    long = replace(rows[0], variant="mod_moe_4t4i_threshold_untied", difference=Interval(-0.1, -0.15, -0.05, 3))
    long_names = [replace(run, meta={**run.meta, "upcycled": {"seed_flops": 0.0}}) for run in runs[1:]]
    drawn = {
        "loss": figures.loss_curves(runs),
        "long_names": figures.loss_curves([runs[0], *long_names]),
        "differences": figures.differences([*rows, long], figures.colours([long.variant, "moe_4t4i"])),
        "shares": figures.expert_shares(found["maps"]),
        "places": figures.expert_places(found["maps"]),
        "routers": figures.routers(found["routing"], "#d55e00"),
        "pictures": figures.pictures([entry] * 3, figures.colours(["dense", "moe_4t4i"])),
    }
    for name, figure in drawn.items():
        assert figure is not None
        figures.save(figure, tmp_path / f"{name}.png")
        drawing = pixels(tmp_path / f"{name}.png")
        assert drawing.shape[1] == 1800, name
        assert (drawing[0] == 255).all() and (drawing[:, -1] == 255).all(), name  # nothing runs over the edge
        assert (drawing < 200).any(), name


def test_the_same_data_give_the_same_bytes(study: dict, tmp_path: Path) -> None:
    maps = collect(study["runs"])[1].eval["maps"]  # type: ignore[index]
    for name in ("a", "b"):
        figures.save(figures.expert_shares(maps), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_of_incomplete_data(study: dict, tmp_path: Path) -> None:
    runs = collect(study["runs"])
    maps = runs[1].eval["maps"]  # type: ignore[index]
    one = {"modalities": maps["modalities"], "grid": maps["grid"], "routers": {"1": dict(maps["routers"]["1"])}}
    one["routers"]["1"]["share"] = {"train": maps["routers"]["1"]["share"]["train"]}  # one mode, one layer
    figures.save(figures.expert_shares(one), tmp_path / "shares.png")
    figures.save(figures.loss_curves(runs[1:]), tmp_path / "loss.png")  # no dense run
    text_only = {
        "columns": ["text 0"],
        "expected": [1.0],
        "share": {"train": [[1, 0]]},
        "image_position": {"train": [[0]]},
    }
    assert figures.expert_places({"grid": [1, 1], "routers": {"0": text_only}}) is None
    assert figures.pictures([], {}) is None
    entry = {"accuracy": 0.9, "majority": 0.75, "auc": None, "experts_true": 1.0}
    for routing in ({"training": [entry]}, {"training": {"4.depth": {"threshold": entry}}}):
        figures.save(figures.routers(routing, "#d55e00"), tmp_path / "routers.png")


def test_dense_is_grey_and_colours_do_not_depend_on_company() -> None:
    assert figures.colours(["dense", "moe_4t4i"])["dense"] == figures.DENSE
    assert figures.colours(["moe_4t4i"])["moe_4t4i"] == figures.SPARSE[0]
    assert len(set(figures.colours(["dense", *"abcde"]).values())) == 6


def test_flops_have_a_readable_unit() -> None:
    assert figures.flop_unit(3.7e13) == (1e12, "TFLOP")
    assert figures.flop_unit(2e18) == (1e18, "EFLOP")
    assert figures.flop_unit(0.5) == (1.0, "FLOP")


@pytest.mark.parametrize("colour", list(figures.MODALITY.values()))
def test_ramps_darken_evenly(colour: str) -> None:
    rgb = figures.ramp(colour)(np.linspace(0, 1, 11))[:, :3]
    luminance = rgb @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
