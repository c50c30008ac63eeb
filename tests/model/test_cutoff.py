"""Cut-offs of a micro-batch and their moving average."""

import pytest
import torch

from moma.model.routing.cutoff import cutoff_of, falling, moving_average


def cutoff(values, count):
    falling_EN, _ = falling(torch.tensor(values)[:, None], None)
    return cutoff_of(falling_EN, torch.tensor([count])).item()


def test_it_is_halfway_between_neighbours():
    values = [0.5, 3.0, -1.0, 2.0]
    assert [cutoff(values, k) for k in range(5)] == [4.0, 2.5, 1.25, -0.25, -2.0]


def test_without_tokens_it_is_not_a_number():
    falling_EN, _ = falling(torch.zeros(0, 2), None)
    assert cutoff_of(falling_EN, torch.tensor([0, 0])).isnan().all()


def test_padding_counts_for_nothing():
    logit_NE, valid_N = torch.tensor([[9.0], [1.0], [2.0], [9.0]]), torch.tensor([False, True, True, False])
    falling_EN, order_EN = falling(logit_NE, valid_N)
    assert order_EN[0, :2].tolist() == [2, 1]
    assert cutoff_of(falling_EN, torch.tensor([1])).item() == 1.5
    assert cutoff_of(falling_EN, torch.tensor([2])).item() == 0.0
    none_EN, _ = falling(logit_NE, torch.zeros(4, dtype=torch.bool))
    assert not cutoff_of(none_EN, torch.tensor([0])).isfinite().any()


def test_the_first_observation_is_the_average_and_later_ones_move_it_slowly():
    state = {"cutoff": torch.zeros(2), "age": torch.zeros(2)}
    seen = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    for i, row in enumerate(seen):
        state = moving_average(state, {"cutoff": row}, 0.95)
        if i < 20:  # a plain mean until its weight would fall below 1 - decay
            torch.testing.assert_close(state["cutoff"], seen[: i + 1].mean(0))
    expected = seen[:20].mean(0)
    for row in seen[20:]:
        expected = 0.95 * expected + 0.05 * row
    torch.testing.assert_close(state["cutoff"], expected)
    assert state["age"].tolist() == [60, 60]


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_an_expert_without_an_observation_keeps_its_own(strange):
    state = {"cutoff": torch.tensor([1.0, 2.0]), "age": torch.tensor([3.0, 3.0])}
    new = moving_average(state, {"cutoff": torch.tensor([strange, 4.0])}, 0.5)
    assert new["cutoff"].tolist() == [1.0, 3.0] and new["age"].tolist() == [3, 4]
    assert moving_average(state, {}, 0.5) is state
