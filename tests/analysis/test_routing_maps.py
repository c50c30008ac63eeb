"""Maps of an eval.json become arrays in the right places."""

import numpy as np
import pytest

from moma.analysis import routing_maps
from moma.analysis.runs import collect


@pytest.fixture
def maps(study: dict) -> dict:
    return collect(study["runs"])[1].eval["maps"]  # type: ignore[index]


def test_shares_hold_what_an_expert_may_compute(maps: dict) -> None:
    assert routing_maps.modes(maps) == ["train", "aux"]
    found = routing_maps.shares(maps, "train")
    assert found.share.shape == (2, 8) and np.allclose(found.share, 0.25) and np.allclose(found.fair, 0.25)
    assert found.column[0] == ("text 0", "text") and found.column[-1] == ("image 3", "image")


def test_mixed_experts_have_a_column_per_modality() -> None:
    share = [[[0.1 * e, 0.2 * e] for e in range(2)]]
    maps = {"experts": ["mixed 0", "mixed 1"], "modalities": ["text", "image"], "share": {"train": share}}
    found = routing_maps.shares(maps, "train")
    assert found.column == [("mixed 0", "text"), ("mixed 1", "text"), ("mixed 0", "image"), ("mixed 1", "image")]
    assert np.allclose(found.share, [[0.0, 0.1, 0.0, 0.2]])
    assert routing_maps.image_experts(maps) == [0, 1]


def test_places_are_those_of_image_experts(maps: dict) -> None:
    assert routing_maps.image_experts(maps) == [4, 5, 6, 7]
    found = routing_maps.places(maps, "aux")
    assert found.shape == (2, 4, 8, 8)
    assert found[1, 2].ravel().tolist() == maps["image_position"]["aux"][1][6]


def test_reliance_is_one_where_the_place_decides() -> None:
    decided, even = np.zeros((1, 2, 2, 2)), np.full((1, 2, 2, 2), 0.5)
    decided[0, 0, 0], decided[0, 1, 1] = 1.0, 1.0
    assert routing_maps.reliance(decided) == pytest.approx([1.0])
    assert routing_maps.reliance(even) == pytest.approx([0.0])
    assert routing_maps.reliance(np.zeros((1, 1, 2, 2))) == pytest.approx([0.0])


def test_a_mosaic_keeps_every_grid() -> None:
    place = np.arange(2 * 3 * 2 * 2, dtype=float).reshape(2, 3, 2, 2)
    sheet = routing_maps.mosaic(place)
    assert sheet.shape == (5, 8)
    assert np.array_equal(sheet[3:5, 3:5], place[1, 1]) and np.isnan(sheet[2]).all() and np.isnan(sheet[:, 2]).all()


def test_maps_that_do_not_fit_are_refused(maps: dict) -> None:
    with pytest.raises(ValueError, match=r"got shares of shape \(2, 8, 2\), need \(layers, 7 experts, 2 modalities\)"):
        routing_maps.shares(maps | {"experts": maps["experts"][1:]}, "train")
    with pytest.raises(ValueError, match=r"need \(layers, 8 experts, 16 places\): run moma evaluate again"):
        routing_maps.places(maps | {"grid": [4, 4]}, "train")
