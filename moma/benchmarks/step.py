"""One whole optimizer step, by the functions of the training loop: sparse against dense, ours against the library's.

    NAME                          micro_batches x (forward, loss, backward), clipping, AdamW, routing state
    NAME: forward and backward    of one micro-batch
    NAME: optimizer               clipping, AdamW, routing state
    ratio at n micro-batches      (n forward and backward + optimizer) / the same of dense

Random tokens with an exact number of images, one document per row, so that every model computes the same attention.
FLOPs by `moma.model.flops` (attention in full), and as torch counts them on the meta device, which agrees within 1 %
(`flops_agree`) but for what attention skips, or computes again in its backward, and for padded groups
(mixture-of-depths), all of whose slots count; the causal count stands in the facts. Memory is what a micro-batch takes
at its peak beyond parameters, gradients and optimizer state, as every one of a step but the first does.

The peer is transformers' Chameleon (`peers_model.py`) under the same autocast over fp32 parameters, and, where the
precision is bf16, also in bf16 throughout as it is loaded by default. It gets fused AdamW and the same clipping.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moma.benchmarks.config import BenchConfig, architecture
from moma.benchmarks.memory import peak_extra_bytes
from moma.benchmarks.micro_batch import images_of, micro_batch, vocabulary
from moma.benchmarks.peers import HF, Entry, built
from moma.benchmarks.peers_model import chameleon, labels_of
from moma.benchmarks.timing import Absent, Bench, Case, Goal
from moma.data.batch import Batch
from moma.distributed import (
    Late,
    ParallelConfig,
    Ranks,
    arrange_,
    autocast,
    choose_precision,
    compiles,
    fast_float32,
    peak_flops,
)
from moma.modality import Vocabulary
from moma.model.attention import document_mask
from moma.model.flops import parts_of, totals
from moma.model.loss import linear_cross_entropy
from moma.model.routing import State
from moma.model.transformer import Architecture, Transformer, build_model
from moma.objectives import NextTokenConfig, next_token, routing_noise
from moma.optim import OptimConfig, build_optimizer, clip_, step_
from moma.twin import Twin, alone, twin_of

PEER = "transformers Chameleon"
FORWARD_BACKWARD, OPTIMIZER = "forward and backward", "optimizer"
OBJECTIVE, OPTIM = NextTokenConfig(), OptimConfig()
SHARES = (0.3, 0.7)  # of image tokens, beside the configured one
AGREEMENT = 0.01  # between FLOPs by formula and as counted

# Bounds by size of the model: dense MFU (attention in full); moe_4t4i / dense forward and backward; the same with the
# optimizer at 8 micro-batches. Sizes without a bound are not judged.
MFU = {"90m": 0.35, "435m": 0.45, "1_4b": 0.52}
SPARSE = {"90m": 1.12, "435m": 1.08, "1_4b": 1.06}
SPARSE_STEP = {"435m": 1.09, "1_4b": 1.10}


@dataclass
class Subject:
    """A model with what its step needs; `batches`: the micro-batches of one step, on the device."""

    model: Transformer
    twin: Twin
    optimizer: torch.optim.AdamW
    batches: Sequence[Batch]
    vocab: Vocabulary
    precision: str
    device: torch.device
    number: int = 0
    late: Late = field(default_factory=Late)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def training_step(subject: Subject) -> None:
    """One optimizer step as `moma train` takes it, but for the log."""
    subject.optimizer.zero_grad(set_to_none=True)  # first, so that the gradients stay for a step of the optimizer alone
    update(subject, *gradients(subject, subject.batches))


def gradients(subject: Subject, batches: Sequence[Batch]) -> tuple[dict[str, State], Tensor]:
    """Add up the gradients of micro-batches; what the routers observed on average, and whether a loss is not finite."""
    observed: dict[str, State] = {}
    told = torch.zeros(len(batches), device=subject.device)
    denominator = sum(batch.n_targets for batch in batches)
    for place, batch in enumerate(batches):
        drawn = routing_noise(subject.twin.model, batch.number, batch.tokens_RL.numel(), 0)
        with autocast(subject.precision, subject.device):
            loss, _, seen = next_token(OBJECTIVE, subject.twin.model, batch, denominator, subject.vocab, False, drawn)
        loss.backward()
        told[place] = ~loss.detach().isfinite()
        for router, state in seen.items():
            own = observed.setdefault(router, {})
            for name, values in state.items():
                own[name] = own.get(name, 0) + values / len(batches)
    return observed, told


def update(subject: Subject, observed: dict[str, State], told: Tensor) -> None:
    """Clipping, AdamW and the routers' state; the host reads what the steps told as late as the loop does."""
    finite = clip_(subject.trained, OPTIM.clip_norm).isfinite()
    subject.late.send(subject.number, torch.cat([told, ~finite[None]]))
    skip = told.any() | ~finite
    step_(subject.optimizer, skip)
    subject.twin.refresh()
    subject.model.update_routing(observed, skip)
    subject.number += 1
    for _ in subject.late.read(1 if subject.device.type == "cuda" else 0):
        pass


def run(config: BenchConfig, device: torch.device) -> Bench:
    """The cases of `config.variants` (the first one is the baseline) and of transformers' Chameleon."""
    vocab, batches = batches_of(config, config.image_share, device)
    cases: list[Case] = []
    facts: dict[str, Any] = {
        "size": config.size,
        "tokens_per_micro_batch": config.tokens,
        "micro_batches": config.micro_batches,
        "image_share": image_share(batches[0]),
        "compiled": compiles(_parallel(config, device), device),
        "peak_flops": peak_flops(_parallel(config, device), device, 1),
        "models": {},
    }
    architectures = {variant: architecture(config, variant) for variant in config.variants}
    for variant, made in architectures.items():
        subject = build(config, made, vocab, batches, device)
        found = flops_of(made, vocab, batches[0])
        facts["models"][variant] = found | {"layers": subject.model.config.n_layers}
        cases += cases_of(variant, subject, found)
        if variant == "moe_4t4i" and device.type == "cuda":
            for share in SHARES:
                cases.append(other_share(config, subject, share))
    first = config.variants[0]
    subject = build(config, architectures[first], vocab, batches, device)
    again = cases_of(f"{first} again", subject, facts["models"][first])[0]
    absent: list[Absent] = []
    if config.peers:
        flops = facts["models"].get("dense", {}).get("flops")
        peers = list(peer_cases(config, vocab, batches, device, flops))
        cases += [each for each in peers if isinstance(each, Case)]
        absent += [each for each in peers if isinstance(each, Absent)]
    return Bench(cases, first, again, absent, facts, goals(config, device.type, facts["peak_flops"]))


def batches_of(config: BenchConfig, share: float, device: torch.device) -> tuple[Vocabulary, list[Batch]]:
    """The vocabulary and the micro-batches of a step with this share of image tokens."""
    side, n_images = images_of(config.rows, config.row_length, share)
    vocab = vocabulary(config.vocab_size, side)
    drawn = [
        micro_batch(vocab, config.rows, config.row_length, n_images, seed=config.seed + number)
        for number in range(config.micro_batches)
    ]
    return vocab, [batch.to(device) for batch in drawn]


def image_share(batch: Batch) -> float:
    """Share of image tokens in a micro-batch."""
    return batch.groups.index[1].numel() / batch.tokens_RL.numel()


def build(
    config: BenchConfig, made: Architecture, vocab: Vocabulary, batches: Sequence[Batch], device: torch.device
) -> Subject:
    """A model with its working copy and its optimizer, arranged as `moma train` does."""
    model = build_model(made, vocab.size, vocab.modalities, seed=config.seed, device=device)
    precision = choose_precision(config.precision, device)
    twin = twin_of(model, torch.bfloat16) if precision == "bf16" else alone(model)
    arrange_(twin.model, _parallel(config, device), Ranks(0, 1), precision, device)
    optimizer = build_optimizer(model.named_parameters(), OPTIM)
    return Subject(model, twin, optimizer, batches, vocab, precision, device)


def _parallel(config: BenchConfig, device: torch.device) -> ParallelConfig:
    return ParallelConfig("cuda" if device.type == "cuda" else "cpu", config.compile)


def flops_of(architecture: Architecture, vocab: Vocabulary, batch: Batch) -> dict[str, Any]:
    """Training FLOPs of one micro-batch: by formula (attention in full, causal) and as counted; parameters."""
    with torch.device("meta"):
        model = Transformer(architecture, vocab.size, vocab.modalities)
    share, tokens = image_share(batch), batch.tokens_RL.numel()
    formula = totals(parts_of(model, batch.tokens_RL.shape[1], (1 - share, share)))
    empty = batch.to("meta")
    with FlopCounterMode(display=False) as counter:
        mask = document_mask(empty.document_RL)
        hidden_RLD, _ = model(empty.tokens_RL, empty.position_RL, mask, empty.groups)
        linear_cross_entropy(
            hidden_RLD.flatten(0, 1), model.head.weight, empty.target_RL.flatten(), denominator=1.0,
            compute_dtype=torch.float32,  # the meta device knows no autocast
        ).objective.backward()  # fmt: skip
    flops, executed = formula["flops_per_token_train"] * tokens, float(counter.get_total_flops())
    return {
        "flops": flops,
        "flops_causal": formula["flops_per_token_train_causal"] * tokens,
        "executed_flops": executed,
        "flops_agree": abs(executed / flops - 1) <= AGREEMENT,
        "params_total": formula["params_total"],
        "params_active": formula["params_active"],
    }


def cases_of(name: str, subject: Subject, found: dict[str, Any]) -> list[Case]:
    """The step of a model and its two phases."""
    count, batch = len(subject.batches), subject.batches[0]
    tokens = batch.tokens_RL.numel()
    last: list[tuple[dict[str, State], Tensor]] = []

    def once() -> None:
        subject.optimizer.zero_grad(set_to_none=True)
        last[:] = [gradients(subject, [batch])]

    def optimize() -> None:  # with the gradients of whatever ran before it; the first is the warm-up of `once`
        update(subject, *last[0])

    def step() -> None:
        training_step(subject)

    def memory() -> int:
        step()  # there are gradients now, to be added to
        return peak_extra_bytes(lambda: gradients(subject, [batch]), subject.device)

    flops, executed = found["flops"], found["executed_flops"]
    within = partial(fast_float32, subject.device)
    return [
        Case(name, step, True, flops * count, executed * count, None, tokens * count, "", memory, within=within),
        Case(f"{name}: {FORWARD_BACKWARD}", once, True, flops, executed, None, tokens, within=within),
        Case(f"{name}: {OPTIMIZER}", optimize, bytes=28.0 * found["params_total"]),  # AdamW: 4 read, 3 written
    ]


def other_share(config: BenchConfig, subject: Subject, share: float) -> Case:
    """The step of a model on micro-batches of another mixture."""
    _, batches = batches_of(config, share, subject.device)
    other = replace(subject, batches=batches, late=Late())
    return Case(shared_name("moe_4t4i", share), lambda: training_step(other), tokens=config.tokens * len(batches))


def shared_name(variant: str, share: float) -> str:
    """Name of the case of a variant at another share of image tokens."""
    return f"{variant}, {share:.0%} image tokens"


# ---- the peer -------------------------------------------------------------------------------------------------------


def peer_cases(
    config: BenchConfig, vocab: Vocabulary, batches: Sequence[Batch], device: torch.device, flops: float | None
) -> Iterator[Case | Absent]:
    """Transformers' Chameleon, eager and, where ours is compiled, compiled too."""
    precision = choose_precision(config.precision, device)
    ways = [("", torch.float32, precision)]
    if precision == "bf16":
        ways.append((", bf16 parameters", torch.bfloat16, "fp32"))  # nothing left to cast
    for suffix, dtype, cast in ways:
        name = f"{PEER}{suffix}"
        made = built(name, Entry(_peer, HF), config, vocab, device, dtype)
        if isinstance(made, Absent):
            yield made
            continue
        optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=OPTIM.lr, fused=True)
        note = "same weights and norm order; no z-loss, no mask on image codes, whole logits, causal SDPA"
        forwards: list[tuple[str, Callable[..., Any]]] = [(name, made)]
        if compiles(_parallel(config, device), device):
            forwards.append((f"{name}, compiled", torch.compile(made)))
        for shown, forward in forwards:
            yield _peer_case(shown, forward, made, optimizer, batches, device, cast, flops, note)


def _peer(config: BenchConfig, vocab: Vocabulary, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = build_model(
        architecture(config, "dense"), vocab.size, vocab.modalities, seed=config.seed, device=device, dtype=dtype
    )
    return chameleon(model, vocab, config.row_length, masks_images=False).train()


def _peer_case(
    name: str,
    forward: Callable[..., Any],
    peer: nn.Module,
    optimizer: torch.optim.AdamW,
    batches: Sequence[Batch],
    device: torch.device,
    precision: str,
    flops: float | None,
    note: str,
) -> Case:
    labels, trained = [labels_of(b.target_RL) for b in batches], optimizer.param_groups[0]["params"]

    def once(number: int) -> None:
        with autocast(precision, device):
            loss = forward(input_ids=batches[number].tokens_RL, labels=labels[number], use_cache=False).loss
        (loss / len(batches)).backward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for number in range(len(batches)):
            once(number)
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        optimizer.step()

    def memory() -> int:
        step()
        return peak_extra_bytes(lambda: once(0), device)

    tokens, total = sum(b.tokens_RL.numel() for b in batches), None if flops is None else flops * len(batches)
    return Case(name, step, False, total, None, None, tokens, note, memory)


# ---- goals ----------------------------------------------------------------------------------------------------------


def goals(config: BenchConfig, device: str, peak: float | None) -> list[Goal]:
    """What is to hold on a CPU or on a GPU, for the models and the number of micro-batches that are measured."""
    wanted: list[Goal] = []
    if device == "cpu":
        for peer in (PEER, f"{PEER}, bf16 parameters"):
            wanted.append(Goal("P3", f"dense step: times as fast as {peer}", 1.3, "dense", peer, at_least=True))
        wanted.append(Goal("P3", "moe_4t4i step / dense step", 1.08, "moe_4t4i", "dense"))
    else:
        size, once, deep = config.size, FORWARD_BACKWARD, "mod_moe_"
        if peak is not None and size in MFU:
            words = f"FLOP/s of the dense step, attention in full: MFU of {MFU[size]:.0%}"
            wanted.append(Goal("H1", words, MFU[size] * peak, "dense", None, "flops", at_least=True))
        for name, bound in (("moe_1t1i", 1.03), ("moe_4t4i", SPARSE.get(size))):
            if bound is not None:
                words = f"{name} / dense, {once}"
                wanted.append(Goal("H2", words, bound, f"{name}: {once}", f"dense: {once}"))
        if config.micro_batches == 8 and size in SPARSE_STEP:
            wanted.append(
                Goal("H3", "moe_4t4i / dense step of 8 micro-batches", SPARSE_STEP[size], "moe_4t4i", "dense")
            )
        for name, bound in (("1t1i", 1.12), ("4t4i", 1.18)):
            words = f"{deep}{name} / dense, {once}"
            wanted.append(Goal("H4", words, bound, f"{deep}{name}: {once}", f"dense: {once}"))
        wanted.append(Goal("H7", "moe_4t4i / dense peak memory", 1.05, "moe_4t4i", "dense", "memory"))
        for share in SHARES:
            case = shared_name("moe_4t4i", share)
            words = f"throughput at {share:.0%} image tokens / at {config.image_share:.0%}"
            wanted.append(Goal("H11", words, 0.95, case, "moe_4t4i", at_least=True))
    return [goal for goal in wanted if goal.case.partition(":")[0].partition(",")[0] in config.variants]
