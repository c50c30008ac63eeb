"""`moma bench`: what it writes and prints, the micro-batch, ceilings, memory, and what it refuses."""

import json
from typing import get_args

import pytest
import torch

from moma import bench, cli
from moma.benchmarks import SUITES, head, layer
from moma.benchmarks.ceilings import measure_ceilings
from moma.benchmarks.config import SuiteName, architecture, feed_forward
from moma.benchmarks.memory import peak_extra_bytes, saved_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.peers import HEADS, LAYERS, Entry, built
from moma.benchmarks.timing import Absent, Bench, Case, Goal
from moma.config import compose, locate
from moma.modality import IGNORE, modality_of
from moma.model.depth import DepthConfig

CPU = torch.device("cpu")


def suite(config, device):
    """A suite of next to nothing."""
    x = torch.ones(100)

    def peer():
        raise RuntimeError("no kernel")

    cases = [Case("plain", x.sum, flops=100, tokens=100), Case("peer", peer, ours=False)]
    goals = [Goal("P1", "plain / plain", 1.0, "plain"), Goal("P2", "peer / plain", 1.0, "plain", "peer")]
    return Bench(cases, "plain", Case("again", x.sum), [Absent("other", "not here")], {"rows": config.rows}, goals)


def test_every_suite_is_there():
    assert get_args(SuiteName) == tuple(SUITES)
    assert all(callable(locate(target)) for target in SUITES.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_speak_of_cases_that_exist(device):
    of_layer = layer.goals("bf16", torch.device(device))
    of_head = head.goals("bf16", torch.device(device), 0.0)
    assert {goal.id for goal in of_layer} == ({"H5", "H6", "H7"} if device == "cuda" else {"P1", "P2", "C4"})
    known = {"moe_1t1i", "moe_4t4i", "dispatch and combine alone", "ours", "naive", "naive, compiled", *LAYERS, *HEADS}
    for goal in (*of_layer, *of_head):
        assert {goal.case or "ours", goal.than or "naive"} <= known


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.SUITES, "layer", f"{__name__}:suite")
    monkeypatch.setattr(bench, "locate", lambda target: suite)
    return ["bench", "suite=layer", "precision=fp32", "device=cpu", "rounds=3", "ceilings=false"]


def test_the_record_holds_what_a_reader_needs(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1.0, 0, 0))
    out = tmp_path / "new" / "layer.json"
    assert cli.main([*small, f"out={out}"]) == 0
    found = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["layer.json"]
    wanted = "suite command config versions machine ceilings noise cases absent goals facts precision baseline"
    assert set(found) == set(wanted.split())
    assert found["command"] == f"moma {' '.join(small)} out={out}"
    assert found["config"]["model"]["dim"] == 512 and found["config"]["size"] == "90m"
    assert found["versions"]["torch"].startswith("2.") and "python" in found["versions"]
    assert {"cpu", "cores", "threads", "load_before", "load_after"} <= set(found["machine"])
    assert [len(each["times_s"]) for each in found["cases"]] == [3, 3]
    assert found["absent"] == [
        {"name": "other", "reason": "not here"},
        {"name": "peer", "reason": "RuntimeError: no kernel"},
    ]
    assert [goal["id"] for goal in found["goals"]] == ["P1", "P2"] and found["goals"][1]["held"] is None
    said = capsys.readouterr().out
    for part in ("absent: peer: RuntimeError: no kernel", "noise: equal work", "goal P1: held", "rows: 1",
                 "goal P2: not judged"):  # fmt: skip
        assert part in said


def test_seconds_of_a_busy_machine_are_not_judged(small, capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0, 0))
    assert cli.main(small) == 0
    said = capsys.readouterr().out
    assert "goal P1: not judged (noise, or a busy machine): plain / plain: 1 for 1" in said
    assert "load average 3.00, above 1.5" in said


def test_threads_are_given_back(small):
    before = torch.get_num_threads()
    cli.main([*small, "threads=2"])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=2"], "got rounds=2 and warmup=2, need at least 3 rounds"),
        (["threads=0"], "got threads=0, need at least 1"),
        (["rows=0"], "got rows=0, row_length=4096"),
        (["image_share=0.0"], "got image_share=0.0, need tokens of both modalities"),
        (["variants=[moe_4t4]"], "got the variant moe_4t4, need an option of feed_forward: did you mean moe_4t4i?"),
        (["variants=[dense,dense]"], "got variants=['dense', 'dense'], need at least one, and each once"),
        (["peers_path=/no/such"], "got peers_path=/no/such, need a folder"),
        (["suite=speed"], "got suite=speed, need one of layer"),
    ],
)  # fmt: skip
def test_refusals(overrides, message, capsys):
    assert cli.main(["bench", "suite=layer", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_variant_is_an_option_and_mod_brings_its_size():
    config = compose("bench", ["suite=step", "model=tiny", "model.dim=96"]).config
    assert architecture(config, "dense").model.dim == 96
    sparse = architecture(config, "mod_moe_1t1i")
    assert isinstance(sparse.depth, DepthConfig) and sparse.model.n_layers != config.model.n_layers
    assert feed_forward("moe_4t4i").experts == {"text": 4, "image": 4}


@pytest.mark.parametrize("shape", [(1, 4096, 0.5, 2), (3, 64, 0.25, 1), (2, 100, 0.3, 4)])
def test_the_micro_batch_has_its_images_whole(shape):
    rows, length, share, documents = shape
    side, n_images = images_of(rows, length, share)
    vocab = vocabulary(256, side)
    batch = micro_batch(vocab, rows, length, n_images, documents)
    codes = modality_of(batch.tokens_RL, vocab) == 1
    assert int(codes.sum()) == n_images * side**2 == batch.groups.index[1].numel()
    assert abs(int(codes.sum()) / (rows * length) - share) <= 0.01
    for row in range(rows):
        begins = (batch.tokens_RL[row] == vocab.boi).nonzero()[:, 0].tolist()
        assert sum(codes[row]) == len(begins) * side**2
        for begin in begins:
            assert codes[row, begin + 1 : begin + 1 + side**2].all()
            assert batch.tokens_RL[row, begin + 1 + side**2] == vocab.eoi
    assert batch.document_RL.max() == documents - 1
    assert batch.n_targets == rows * (length - documents) == int((batch.target_RL != IGNORE).sum())
    assert torch.equal(batch.tokens_RL, micro_batch(vocab, rows, length, n_images, documents).tokens_RL)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got image_share=0.9 for 1 rows of 8 tokens, need images with a begin"):
        images_of(1, 8, 0.9)


def test_ceilings_are_rates():
    found = measure_ceilings(CPU, torch.float32, (64, 32, 16), side=64, n_bytes=2**16)
    assert set(found) == {"gemm", "gemm_layer", "read", "copy"} and min(found.values()) > 1e6


def test_peak_memory_is_exact_and_counts_what_operators_hold_inside():
    x = torch.ones(1000)

    def step():
        a = x + 1  # 4000
        b = torch.cat([a, a])  # 8000
        del a
        return b * 2  # 8000, beside b

    (peak,) = {peak_extra_bytes(step, CPU) for _ in range(3)}
    assert 16000 <= peak < 16100  # numbers on their way into an operator are tensors, too


def test_saved_bytes_are_of_distinct_storages_without_parameters():
    weight, x = torch.ones(10, 10, requires_grad=True), torch.ones(5, 10, requires_grad=True)

    def forward():
        h = x @ weight  # saves x (200 bytes) and the weight
        return h * h.view(5, 10)  # saves h, twice

    assert saved_bytes(forward, [weight]) == 400
    assert saved_bytes(forward, []) == 800


def test_a_peer_that_cannot_be_built_says_why():
    def missing():
        import no_such_library  # noqa: F401

    def wrong():
        raise ValueError("needs more")

    assert built("a", Entry(missing, "pip install it")) == Absent(
        "a", "ModuleNotFoundError: No module named 'no_such_library' (pip install it)"
    )
    assert built("b", Entry(wrong, "")) == Absent("b", "ValueError: needs more")
