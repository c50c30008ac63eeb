"""Maps of an eval.json become arrays in the right places."""

import numpy as np
import pytest

from moma.analysis import routing_maps
from moma.analysis.runs import collect


@pytest.fixture
def maps(study: dict) -> dict:
    return collect(study["runs"])[1].eval["maps"]  # type: ignore[index]


def test_shares_hold_what_an_expert_may_compute(maps: dict) -> None:
    assert routing_maps.modes(maps) == ["train", "aux", "aux_calibrated", "threshold"]
    found = routing_maps.shares(maps, "train")
    assert found.share.shape == (2, 10) and found.layer == [0, 1]
    assert np.allclose(found.share[:, :8], 0.25) and np.allclose(found.fair[:, :8], 0.25)
    assert found.column[0] == ("text 0", "text") and found.column[7] == ("image 3", "image")
    assert found.column[8:] == [("depth", "text"), ("depth", "image")]
    assert np.array_equal(found.share[:, 8:], [[0.2, 0.3], [np.nan, np.nan]], equal_nan=True)  # layer 1 has no depth


def test_mixed_experts_have_a_column_per_modality() -> None:
    maps = of_routers({"0": ("mixed", 2)})
    found = routing_maps.shares(maps, "train")
    assert found.column == [("mixed 0", "text"), ("mixed 1", "text"), ("mixed 0", "image"), ("mixed 1", "image")]
    assert np.allclose(found.share, [[0.0, 0.1, 0.0, 0.2]])
    assert routing_maps.places(maps, "train").expert == ["mixed 0", "mixed 1"]


def of_routers(routers: dict[str, tuple[str, int]]) -> dict:
    """Maps of one group of experts per router; a size of 0 is one column without a number."""
    made = {}
    for name, (group, size) in routers.items():
        columns = [f"{group} {e}" for e in range(size)] or [group]
        numbers = range(len(columns))
        made[name] = {
            "columns": columns,
            "expected": [1 / len(columns) for _ in numbers],
            "share": {"train": [[0.1 * e, 0.2 * e] for e in numbers]},
            "image_position": {"train": [[0.1 * e] * 4 for e in numbers]},
        }
    return {"modalities": ["text", "image"], "grid": [2, 2], "routers": made}


def test_layers_may_differ() -> None:
    maps = of_routers({"1": ("image", 2), "10": ("image", 4), "3.depth": ("depth text", 0)})
    found = routing_maps.shares(maps, "train")
    assert found.layer == [1, 3, 10]
    assert [name for name, _ in found.column] == ["image 0", "image 1", "image 2", "image 3", "depth text"]
    assert np.isnan(found.share).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert found.fair[0, 0] == 1 / 2 and found.fair[2, 0] == 1 / 4
    places = routing_maps.places(maps, "train")
    assert places.layer == [1, 10] and places.expert == [f"image {e}" for e in range(4)]  # depth of text sees no image
    assert np.isnan(places.place[0, 2:]).all() and np.isfinite(routing_maps.reliance(places.place)).all()


def test_places_are_those_of_image_experts(maps: dict) -> None:
    found = routing_maps.places(maps, "aux")
    assert found.expert == ["image 0", "image 1", "image 2", "image 3", "depth"]
    assert found.place.shape == (2, 5, 8, 8)
    assert found.place[1, 2].ravel().tolist() == maps["routers"]["1"]["image_position"]["aux"][6]
    text = routing_maps.places(of_routers({"0": ("text", 2)}), "train")
    assert text.place.shape == (0, 0, 2, 2)


def test_files_of_older_versions_are_read() -> None:
    """One list over layers of equal routers, one kind of causal router."""
    old = {
        "experts": ["image 0", "image 1"], "modalities": ["text", "image"], "grid": [1, 2],
        "share": {"train": [[[0, 0.5], [0, 0.5]]] * 3}, "image_position": {"train": [[[0.1, 0.9], [0.9, 0.1]]] * 3},
        "top_tokens": [[[], []]] * 3,
    }  # fmt: skip
    assert list(routing_maps.routers(old)) == ["0", "1", "2"]
    assert np.allclose(routing_maps.shares(old, "train").share, 0.5)
    assert np.allclose(routing_maps.shares(old, "train").fair, 0.5)
    assert routing_maps.places(old, "train").place.shape == (3, 2, 1, 2)
    assert routing_maps.agreement({"training": [{"auc": 0.9}]}) == {"training": {"0": {"aux": {"auc": 0.9}}}}


def test_reliance_is_one_where_the_place_decides() -> None:
    decided, even = np.zeros((1, 2, 2, 2)), np.full((1, 2, 2, 2), 0.5)
    decided[0, 0, 0], decided[0, 1, 1] = 1.0, 1.0
    assert routing_maps.reliance(decided) == pytest.approx([1.0])
    assert routing_maps.reliance(even) == pytest.approx([0.0])
    assert routing_maps.reliance(np.zeros((1, 1, 2, 2))) == pytest.approx([0.0])
    with_a_gap = np.concatenate([decided, np.full((1, 1, 2, 2), np.nan)], 1)
    assert routing_maps.reliance(with_a_gap) == pytest.approx([1.0])


def test_a_mosaic_keeps_every_grid() -> None:
    place = np.arange(2 * 3 * 2 * 2, dtype=float).reshape(2, 3, 2, 2)
    sheet = routing_maps.mosaic(place)
    assert sheet.shape == (5, 8)
    assert np.array_equal(sheet[3:5, 3:5], place[1, 1]) and np.isnan(sheet[2]).all() and np.isnan(sheet[:, 2]).all()


def test_maps_that_do_not_fit_are_refused(maps: dict) -> None:
    with pytest.raises(ValueError, match=r"got shares of shape \(1, 2\) for router 0.depth, need \(1 experts, 3 modal"):
        routing_maps.shares(maps | {"modalities": ["text", "image", "audio"]}, "train")
    with pytest.raises(ValueError, match=r"for router 0.depth, need \(1 experts, 16 places\): run moma evaluate again"):
        routing_maps.places(maps | {"grid": [4, 4]}, "train")
