import pytest
import torch

from moma.modality import exact_groups, modality_of, padded_groups


def test_only_image_codes_are_image_tokens(vocabulary):
    ids = torch.tensor([0, 1, 2, 3, 4, 19, 20, 21, 24, 63])
    assert modality_of(ids, vocabulary).tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert modality_of(ids.view(2, 5), vocabulary).shape == (2, 5)
    assert vocabulary.modalities == ("text", "image") and vocabulary.tokens_per_image == 4


def test_third_modality_is_one_more_entry(three_modalities):
    assert three_modalities.modalities == ("text", "image", "audio")
    assert modality_of(torch.tensor([55, 56, 63, 4]), three_modalities).tolist() == [0, 2, 2, 1]


def test_exact_groups_partition_the_tokens(three_modalities, make_batch):
    tokens = make_batch(three_modalities, seed=0).tokens_RL
    groups = exact_groups(tokens, three_modalities)
    modality = modality_of(tokens.flatten(), three_modalities)
    assert groups.valid is None
    assert torch.equal(torch.cat(groups.index).sort().values, torch.arange(tokens.numel()))
    for m, (index, slot) in enumerate(zip(groups.index, groups.slot, strict=True)):
        assert index.dtype == slot.dtype == torch.int64
        assert torch.equal(index, index.sort().values)
        assert torch.equal(slot[index], torch.arange(index.numel()))
        assert torch.equal(slot >= 0, modality == m)


def test_made_up_batches_have_constant_counts(variant, make_batch):
    counts = {tuple(i.numel() for i in make_batch(variant.vocabulary, seed).groups.index) for seed in range(8)}
    assert len(counts) == 1


def test_padded_groups_hold_the_tokens_first_and_no_padding(vocabulary):
    ids = torch.tensor([[0, 30, 4, 5, 2, 1], [0, 6, 2, 1, 1, 1]])
    present = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    groups = padded_groups(ids, present, vocabulary, bound=7)
    assert groups.valid is not None
    expected = ([0, 1, 4, 6, 8], [2, 3, 7])
    for m, positions in enumerate(expected):
        n = len(positions)
        assert groups.index[m].shape == groups.valid[m].shape == (7,)
        assert groups.valid[m].tolist() == [True] * n + [False] * (7 - n)
        assert groups.index[m][:n].tolist() == positions
        assert groups.slot[m][positions].tolist() == list(range(n))
        assert (groups.slot[m] >= 0).sum() == n
    assert padded_groups(ids, present, vocabulary).index[0].shape == (12,)


def test_padded_groups_refuse_more_tokens_than_the_bound(vocabulary):
    ids = torch.tensor([4, 5, 6, 30])
    with pytest.raises(ValueError, match="got 3 image tokens, need at most the bound of 2: raise the bound"):
        padded_groups(ids, torch.ones(4).bool(), vocabulary, bound=2)


def test_merged_is_one_group_of_every_token(vocabulary):
    ids = torch.tensor([0, 4, 30, 1])
    exact = exact_groups(ids, vocabulary).merged()
    assert exact.valid is None and exact.index[0].tolist() == exact.slot[0].tolist() == [0, 1, 2, 3]
    padded = padded_groups(ids, ids != vocabulary.pad, vocabulary).merged()
    assert padded.valid is not None
    assert padded.valid[0].tolist() == [True, True, True, False]
    assert padded.slot[0].tolist() == [0, 1, 2, -1]


def test_to_moves_every_tensor(vocabulary):
    ids = torch.tensor([0, 4, 30, 1])
    for groups in (exact_groups(ids, vocabulary), padded_groups(ids, ids != 1, vocabulary)):
        moved = groups.to("meta")
        tensors = (*moved.index, *moved.slot, *(moved.valid or ()))
        assert all(t.device.type == "meta" for t in tensors)
        assert (moved.valid is None) == (groups.valid is None)
