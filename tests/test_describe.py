"""`describe`: recorded integers of the published sizes, its JSON, and a memory estimate that holds."""

import json

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from moma import cli, describe
from moma.config import compose
from moma.data.batch import build_batch
from moma.data.plan import Plan
from moma.data.shards import open_corpus
from moma.data.synthetic import write_synthetic
from moma.distributed import autocast
from moma.model.transformer import build_model
from moma.objectives import NextTokenConfig, next_token
from moma.optim import OptimConfig, build_optimizer

# (total, active) with a vocabulary of 65,536, and the total computed for a width of 8 d / 3 without rounding
COUNTS = {
    ("90m", "dense"): (92_416_512, 92_416_512, 92.3e6),
    ("90m", "moe_1t1i"): (109_324_800, 92_416_512, 109e6),
    ("90m", "moe_8x"): (210_807_296, 92_449_280, 209.7e6),
    ("90m", "moe_4t4i"): (210_807_296, 92_449_280, 209.7e6),
    ("435m", "dense"): (437_836_800, 437_836_800, 436.2e6),
    ("435m", "moe_1t1i"): (640_736_256, 437_836_800, 637e6),
    ("435m", "moe_8x"): (1_858_329_600, 438_033_408, 1845e6),
    ("435m", "moe_4t4i"): (1_858_329_600, 438_033_408, 1845e6),
    ("1_4b", "dense"): (1_478_080_512, 1_478_080_512, 1476e6),
    ("1_4b", "moe_1t1i"): (2_284_959_744, 1_478_080_512, 2.28e9),
    ("1_4b", "moe_8x"): (7_126_628_352, 1_478_473_728, 7113e6),
    ("1_4b", "moe_4t4i"): (7_126_628_352, 1_478_473_728, 7113e6),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("made"), pairs=400, texts=400)


def config(made, *overrides):
    tokenizer, corpus, _ = made
    return compose("describe", [f"tokenizer={tokenizer}", f"data.corpus={corpus}", *overrides]).config


@pytest.mark.parametrize(("model", "feed_forward"), COUNTS)
def test_published_sizes(made, model, feed_forward):
    total, active, paper = COUNTS[model, feed_forward]
    got = describe.describe(config(made, f"model={model}", f"feed_forward={feed_forward}", "vocab_size=65536"))
    assert (got["params_total"], got["params_active"]) == (total, active)
    assert got["params_total"] == pytest.approx(paper, rel=0.01)
    assert got["flops_per_token_train"] == 3 * got["flops_per_token_forward"]
    assert sum(part["params"] for part in got["parts"].values()) == total


def test_the_command_prints_one_json_object(made, capsys):
    tokenizer, _, _ = made
    assert cli.main(["describe", f"tokenizer={tokenizer}", "output=json"]) == 0
    got = json.loads(capsys.readouterr().out)
    keys = {"params_total", "params_active", "flops_per_token_forward", "flops_per_token_train"}
    assert keys | {"parts", "memory"} <= set(got)
    assert got["choices"]["feed_forward"] == "moe_4t4i"
    assert cli.main(["describe", f"tokenizer={tokenizer}"]) == 0
    assert "feed_forward" in capsys.readouterr().out


@pytest.mark.parametrize(("feed_forward", "precision"), [("dense", "bf16"), ("moe_4t4i", "bf16"), ("moe_4t4i", "fp32")])
def test_memory_estimate_is_within_ten_percent_of_the_measured_peak(made, feed_forward, precision):
    _, corpus, vocab = made
    # tiny with its own micro-batch; 32 small pictures carry as many image tokens as 8 large ones
    wanted = config(made, f"feed_forward={feed_forward}", f"precision={precision}", "vocab_size=5184", "data.images=32")
    estimate = describe.describe(wanted)["memory"]
    sources = dict(open_corpus(corpus, "train", vocab.hash))
    micro_batch, _ = next(Plan(sources, wanted.data.shape, seed=0).run())
    batch = build_batch(micro_batch, sources, wanted.data.shape, vocab)
    model = build_model(wanted.model, wanted.feed_forward, 5184, seed=0)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())

    def step():
        with autocast(precision, torch.device("cpu")):
            loss, _ = next_token(NextTokenConfig(), model, batch, batch.n_targets, vocab, False, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    assert estimate["peak"] == pytest.approx(peak, rel=0.10)
    assert estimate["parameters"] == sum(4 * p.numel() for p in model.parameters())
