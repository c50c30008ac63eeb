"""What two processes do together for `test_train_parallel.py`, all in one process group.

    python -m torch.distributed.run --nproc-per-node=2 two_ranks.py TASKS.json OUT.json

`runs`: command lines of `moma train`, one after the other. `cases` ({"name", "overrides", "lacks"}): the same two steps
alone and shared out, and how far they differ; both ranks must find the same. Each rank takes the steps alone of every
second case, and the other gets them from it.
"""

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moma import distributed, train
from moma.config import compose
from moma.data.batch import build_batch
from moma.data.plan import Plan
from moma.data.shards import open_corpus
from moma.distributed import (
    REDUCE_DTYPES,
    ParallelConfig,
    Ranks,
    arrange_,
    autocast,
    average_,
    process_group,
    send_gradients,
    sum_,
    whole,
)
from moma.modality import exact_groups
from moma.model.feed_forward import SparseFeedForward
from moma.model.transformer import build_model
from moma.objectives import OBJECTIVES, freeze_for, routing_noise
from moma.optim import build_optimizer, clip_, norms_by_part, step_
from moma.tokenizer.vocab import asset_folder, load_vocabulary

STEPS, PER_STEP = 2, 4
CPU = torch.device("cpu")


def take_steps(config, vocab, planned, ranks, parallel):
    """Losses, gradients, tallies and parameters of two steps of a fresh model; a rank runs its own micro-batches."""
    torch._dynamo.reset()
    model = build_model(
        config.architecture, vocab.size, vocab.modalities, seed=0, aux_routers=config.objective.needs_aux_routers
    )
    freeze_for(config.objective, model)
    arrange_(model, parallel, ranks, config.precision, CPU)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    objective, found = OBJECTIVES[config.objective.kind][1], []
    for step in range(STEPS):
        batches = planned[step * PER_STEP : (step + 1) * PER_STEP]
        denominator, own = sum(batch.n_targets for batch in batches), batches[ranks.rank :: ranks.world]
        total, counted, observed = torch.zeros(()), {}, {}
        for batch in own:
            send_gradients(model, batch is own[-1])
            noise = routing_noise(model, batch.number, batch.tokens_RL.numel(), 0, gumbel=True)
            with autocast(config.precision, CPU):
                loss, tallies, states = objective(config.objective, model, batch, denominator, vocab, True, noise)
            (loss * ranks.world).backward()
            total += loss.detach()
            for name, tally in tallies.items():
                counted[name] = counted.get(name, 0) + tally.detach()
            for router, state in states.items():
                for name, values in state.items():
                    mean = observed.setdefault(router, {})
                    mean[name] = mean.get(name, 0) + values / PER_STEP
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        squares = None
        if ranks.world > 1:
            average_(
                [g for g in gradients.values() if not isinstance(g, DTensor)], REDUCE_DTYPES[parallel.reduce_dtype]
            )
            squares = norms_by_part(model.named_parameters(), ranks.world, parallel.replicas)
            states = [values for state in observed.values() for values in state.values()]
            sum_([total, *(counted[name] for name in sorted(counted)), *states, *squares.values()])
        squares = squares or norms_by_part(model.named_parameters(), 1, 1)
        values = {n: whole(g).clone() for n, g in gradients.items()}
        norm = clip_(model.parameters(), 1.0)
        step_(optimizer, torch.tensor(False))
        optimizer.zero_grad(set_to_none=True)
        model.update_routing(observed)
        found.append({"loss": total, "norm": norm, "tallies": counted, "parts": squares, "gradients": values})
    routing = {
        f"{router}/{name}": v
        for router, module in model.routers().items()
        for name, v in module.routing_state().items()
    }
    return found, routing, model


def furthest(one, two):
    """Largest difference of two nested dicts of tensors, as a share of the largest number of its tensor."""
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    worst = 0.0
    for name, value in one.items():
        if isinstance(value, dict):
            worst = max(worst, furthest(value, two[name]))
        elif value.numel():
            a, b = value.double(), two[name].double()
            worst = max(worst, (a - b).abs().max().item() / max(a.abs().max().item(), 1e-3))
    return worst


def watch_dtypes():
    """What routers and experts are inside the forward of a sparse layer, filled in as models run."""
    seen, logits = {"router": set(), "experts": set()}, SparseFeedForward._logits

    def watched(self, x_TD, low_TD):
        if not torch.compiler.is_compiling() and self.router is not None:
            seen["router"].add(str(self.router.dtype))
            seen["experts"].add(str(self.experts[0].w13.dtype))
        return logits(self, x_TD, low_TD)

    SparseFeedForward._logits = watched
    return seen


def without_images(batch, vocab):
    """The micro-batch with text in the place of image codes: the second of two ranks gets only such ones."""
    tokens_RL = torch.where(
        batch.tokens_RL.ge(vocab.image_start) & batch.tokens_RL.lt(vocab.image_stop), 70, batch.tokens_RL
    )
    return replace(batch, tokens_RL=tokens_RL, groups=exact_groups(tokens_RL, vocab), exact=False)


def planned_steps(case):
    """The configuration of a case, its vocabulary, and the micro-batches of its steps."""
    config = compose("train", case["overrides"]).config
    vocab = load_vocabulary(asset_folder(config.tokenizer))
    sources = dict(open_corpus(config.data.corpus, "train", vocab.hash))
    plan, planned = Plan(sources, config.data.shape, 0, {}), []
    for micro_batch, _ in plan.run():
        batch = build_batch(micro_batch, sources, plan.shape, vocab)
        planned.append(without_images(batch, vocab) if case["lacks"] and len(planned) % 2 else batch)
        if len(planned) == STEPS * PER_STEP:
            break
    return config, vocab, planned


def steps_alone(case):
    """What one process finds in a case, and its routing state."""
    config, vocab, planned = planned_steps(case)
    # in bf16, a compiled graph rounds elsewhere than an eager one
    like = config.parallel.compile if config.precision == "bf16" else "off"
    found, routing, _ = take_steps(config, vocab, planned, Ranks(0, 1), ParallelConfig(device="cpu", compile=like))
    return found, routing


def compare(case, alone, ranks, seen):
    """One case: how far two ranks are from one."""
    config, vocab, planned = planned_steps(case)
    one, routing_one = alone
    for kinds in seen.values():
        kinds.clear()
    two, routing_two, model = take_steps(config, vocab, planned, ranks, config.parallel)
    tallies = [found["tallies"] for found in (one[0], two[0])]
    return {
        "loss": [abs(a["loss"] - b["loss"]).item() / a["loss"].item() for a, b in zip(one, two, strict=True)],
        "first": furthest(one[0], two[0]),
        "second": furthest(one[1], two[1]),
        "routing": furthest(routing_one, routing_two),
        "counts": all(torch.equal(tallies[0][name][1], tallies[1][name][1]) for name in tallies[0]),
        "dtypes": {name: sorted(kinds) for name, kinds in seen.items()},
        "held": {
            name: [(p.to_local() if isinstance(p, DTensor) else p).numel(), p.numel()]
            for name, p in model.named_parameters()
        },
    }


def main(tasks, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.BUCKET = 5000  # several reductions a step, as large models have
    if not tasks["inductor"]:  # the graphs alone, without kernels
        torch.compile = partial(torch.compile, backend="aot_eager")
    gc.freeze()  # see conftest.py
    gc.set_threshold(20_000, 20, 20)
    with process_group("cpu") as ranks:
        assert ranks.world == 2
        for command in tasks["runs"]:
            assert train.main(compose("train", command)) == 0
        own = [steps_alone(case) for case in tasks["cases"][ranks.rank :: 2]]
        halves: list = [None, None]
        dist.all_gather_object(halves, own)
        alone = [halves[number % 2][number // 2] for number in range(len(tasks["cases"]))]
        seen = watch_dtypes()
        results = {
            case["name"]: compare(case, one, ranks, seen) for case, one in zip(tasks["cases"], alone, strict=True)
        }
        gathered = [None, None]
        dist.all_gather_object(gathered, results)
        assert gathered[0] == gathered[1]
        if ranks.rank == 0:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
