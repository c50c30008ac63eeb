"""Suite `attention`: every case computes the same layer, and the candidates for GPUs are named."""

import pytest
import torch
import torch.nn.functional as F

from moma.benchmarks import attention
from moma.benchmarks.timing import measure
from moma.config import compose
from moma.model.attention import dense_mask

CPU = torch.device("cpu")
TOY = ["suite=attention", "model.dim=32", "model.n_heads=4", "rows=2", "row_length=32", "vocab_size=256", "documents=3"]


@pytest.mark.parametrize("heads", [4, 2])
def test_cases_over_the_same_documents_agree(heads):
    suite = attention.run(compose("bench", [*TOY, "precision=fp32", f"model.n_kv_heads={heads}"]).config, CPU)
    found = {case.name: case.run for case in (*suite.cases, suite.twin)}
    for one, other in (
        ("SDPA, boolean mask, packed", "ours, packed"),
        ("SDPA, boolean mask, packed", "SDPA, boolean mask again, packed"),
        ("SDPA causal, one document", "ours, one document"),
        ("SDPA causal, one by one, packed", "ours, packed"),
    ):
        for own, wanted in zip(found[one](), found[other](), strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    packed, single = found["ours, packed"]()[0], found["ours, one document"]()[0]
    assert not torch.allclose(packed, single)


def test_the_candidates_for_gpus_are_named():
    suite = attention.run(compose("bench", [*TOY, "precision=bf16"]).config, CPU)
    assert {each.name.split(",")[0] for each in suite.absent} >= {"flex", "varlen", "SDPA cuDNN causal"}
    readings, absent = measure(suite, 3, 1, CPU)
    assert len(absent) == 5 and all(each.memory_bytes for each in readings if each.flops)
    assert suite.facts["pairs"] == {"packed": 2 * (66 + 66 + 55), "one document": 2 * 528}
    assert {goal.id for goal in attention.goals(torch.device("cuda"), 8)} == {"H9"} and not suite.goals


def test_flex_and_varlen_get_the_same_documents(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    document = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7], dtype=torch.int32)
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 16, 8, generator=source) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q, k, v, dense_mask(document))
    torch.testing.assert_close(attention.flex(document, False)(q, k, v), wanted, rtol=1e-4, atol=1e-5)

    def one_by_one(q_THA, k_THA, v_THA, ends, keys, longest, longest_keys, **causal):
        assert torch.equal(ends, keys) and longest == longest_keys == 11 and causal
        cuts = ends[1:-1].tolist()
        parts = zip(*(x.tensor_split(cuts) for x in (q_THA, k_THA, v_THA)), strict=True)
        each = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True) for part in parts]
        return torch.cat([y.transpose(0, 1) for y in each])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)
    torch.testing.assert_close(attention.varlen(document)(q, k, v), wanted, rtol=1e-4, atol=1e-5)
