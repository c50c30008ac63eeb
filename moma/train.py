"""Pre-train: the loop, one for every variant and objective.

    plan -> batch -> objective -> backward -> clip -> AdamW           every `log.interval` steps: metrics.jsonl
                                                                      every `checkpoint.interval`: checkpoint

Same command again = resume: the newest whole checkpoint of the run folder goes on, bit for bit. Identity fields
(what the numbers depend on) must be the same, else the differences are printed and nothing is touched; the rest may
change. A step whose loss or gradient is not finite changes nothing: it is counted, named in skipped.jsonl, and after
`max_skipped` of them the run ends.

Under `torchrun`, or with `parallel.processes`, the micro-batches of a step are shared out among the processes; losses
are divided by the targets of all of them, gradients and routing observations summed. Each process holds all parameters,
or its part of them (`parallel.shard`). Neither this nor the number of processes is part of a run: another one goes on
with the same micro-batches per step.

The host never waits for the device inside a step: what it must know of a step (is a process asked to stop? was the loss
finite?) travels with the gradients, is the same on all processes, and is read while the next step runs.
"""

import contextlib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moma import checkpoint, launch
from moma.config import Composed
from moma.data.batch import Batch
from moma.data.loader import Loader
from moma.data.plan import MicroBatch, Plan, documents_of
from moma.data.shards import open_corpus
from moma.distributed import (
    REDUCE_DTYPES,
    Late,
    Ranks,
    arrange_,
    autocast,
    average_,
    begin_pass,
    choose_device,
    choose_precision,
    compiles,
    fast_float32,
    peak_flops,
    process_group,
    send_gradients,
    shares_out,
    sum_,
)
from moma.evaluation import perplexity
from moma.evaluation.diagnostics import specialisation
from moma.log import Progress, RunLog, clock
from moma.memory import RESIDENT, step_memory
from moma.meter import Meter
from moma.modality import Vocabulary
from moma.model.depth import DepthBlock
from moma.model.feed_forward import Mode
from moma.model.flops import aux_flops, parts_of, totals
from moma.model.routing import Disturbance, State
from moma.model.transformer import Transformer, build_model
from moma.objectives import OBJECTIVES, Tallies, freeze_for, is_aux, routing_noise
from moma.optim import (
    build_optimizer,
    check_accumulation,
    clip_,
    learning_rate,
    norms_by_part,
    set_learning_rate,
    step_,
)
from moma.run import (
    TrainConfig,
    check_identity,
    default_run_dir,
    git_state,
    has_noise,
    identity_of,
    load_parameters,
    provenance,
    require_held_out,
    step_flops,
    training_plan,
    validation_batches,
)
from moma.tokenizer.vocab import asset_folder, load_vocabulary
from moma.trace import Trace
from moma.twin import Twin, alone, twin_of

SAME_S = 1.0  # seconds within which two signals are one request to stop
SKIPPED = "skipped.jsonl"  # of a run: steps that were left out, and the documents they would have learnt from


def main(composed: Composed) -> int:
    """`moma train`: start or resume a run; returns 0 when it is finished or was asked to stop."""
    config: TrainConfig = composed.config
    if config.parallel.processes and launch.wanted(config.parallel.processes):
        return launch.run_processes(["train", *composed.overrides], config.parallel.processes)
    run_dir = config.run_dir or default_run_dir(composed)
    return train(config, composed.resolved, run_dir)


def train(config: TrainConfig, resolved: dict[str, Any], run_dir: Path) -> int:
    """Run (or resume) `config` in `run_dir`; see the module docstring. Raises ValueError for a user's mistake."""
    device = choose_device(config.parallel.device)
    with process_group(config.parallel.device, config.parallel.timeout_min) as ranks, fast_float32(device):
        return _train(config, resolved, run_dir, ranks)


def _train(config: TrainConfig, resolved: dict[str, Any], run_dir: Path, ranks: Ranks) -> int:
    """What every process does; the first one writes the log and speaks."""
    if config.data.accumulation % ranks.world:
        raise ValueError(
            f"got data.accumulation={config.data.accumulation} micro-batches per step on {ranks.world} processes, need "
            f"a multiple, so that all work alike: set data.accumulation={ranks.world}, or start fewer processes"
        )
    check_accumulation(config.optim, config.data.accumulation // ranks.world)
    first = ranks.rank == 0
    if config.parallel.threads:
        torch.set_num_threads(config.parallel.threads)
    device = choose_device(config.parallel.device)
    vocab = load_vocabulary(asset_folder(config.tokenizer))
    sources = open_corpus(config.data.corpus, "train", vocab.hash)
    plan = training_plan(config, dict(sources), vocab)
    newest = checkpoint.latest(run_dir / "checkpoints")
    meta = checkpoint.read_meta(newest) if newest else {}
    if meta.get("imported"):
        raise ValueError(
            f"got run_dir={run_dir}, an import, which has nothing to resume, need a run folder of its own: set another "
            f"run_dir and init_from={run_dir}"
        )
    precision = config.precision
    if precision == "auto":
        precision = meta.get("precision") or choose_precision("auto", device)
    identity = identity_of(resolved, precision, vocab, plan, config.data.corpus)
    if meta:
        check_identity(meta["config"], identity, run_dir)

    needs_aux = config.objective.needs_aux_routers
    model = build_model(
        config.architecture, vocab.size, vocab.modalities, seed=config.seed.init, aux_routers=needs_aux, device=device
    )  # fmt: skip
    init_step = meta.get("init_step")
    if config.init_from and not newest:
        init_step = load_parameters(model, config.init_from, identity, needs_aux)
    freeze_for(config.objective, model)
    twin = twin_of(model, torch.bfloat16) if precision == "bf16" and not shares_out(config.parallel) else alone(model)
    arrange_(twin.model, config.parallel, ranks, precision, device)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    state = {
        "model": checkpoint.model_state(model),
        "optimizer": checkpoint.optimizer_state(model, optimizer),
    }
    if newest:
        checkpoint.load(newest, state)
        twin.refresh()

    shares = config.data.modality_shares(vocab)
    flops = totals(parts_of(model, config.data.row_length, shares))
    flops_per_token = step_flops(config.objective, flops, aux_flops(model, shares)[1])
    tokens_per_step = config.data.tokens_per_step
    total = config.duration.to_steps(tokens_per_step, flops_per_token, None)
    learning_rate(0, total, config.optim, tokens_per_step, flops_per_token)  # refuses bad schedules before work
    if first and meta and meta["total_steps"] != total:
        print(f"{run_dir}: {meta['total_steps']} steps before, {total} now: the learning rate follows the new horizon")
    if config.eval.interval and config.objective.trains_model:
        require_held_out(config.data.corpus, vocab)
    run = _Run(
        config,
        run_dir,
        vocab,
        model,
        twin,
        optimizer,
        identity,
        device,
        precision,
        total,
        meta.get("window", {}) if first else {},  # it was summed over the ranks
        init_step,
        git_state(),
        has_noise(config, meta),
        meta.get("upcycled"),
        ranks,
        meta.get("skipped", 0),
        flops["flops_per_token_forward_causal"] / flops["flops_per_token_forward"],
    )
    if first:
        with torch.device("meta"):
            outline = Transformer(config.architecture, vocab.size, vocab.modalities, needs_aux)
        run.print_plan(outline, flops, flops_per_token, sources, meta)
    keep_every = config.checkpoint.keep_every
    keep = checkpoint.Keep(
        config.checkpoint.keep_last,
        keep_every and max(1, keep_every.to_steps(tokens_per_step, flops_per_token, total)),
        config.checkpoint.keep_best,
    )
    meter = Meter(peak_flops(config.parallel, device, ranks.world), state=meta.get("meter"))
    with checkpoint.alone(run_dir) if first else contextlib.nullcontext():
        log = None
        if first:
            _forget_skipped(run_dir / SKIPPED, meta.get("step", 0))
            about = identity | {"total_steps": total, "upcycled": meta.get("upcycled"), "git": run.git}
            log = RunLog(run_dir, config.log, about, meta.get("metrics_offset"), meta.get("wandb_id"))
        loader = Loader(
            plan, dict(sources), vocab, state=meta.get("data"), per_step=config.data.accumulation, **ranks._asdict(),
            padded=not config.data.balance and compiles(config.parallel, device),  # static shapes for counts that vary
            pin=device.type == "cuda",
        )  # fmt: skip
        try:
            with closing(checkpoint.Saver(run_dir / "checkpoints", keep)) as saver:
                return run.loop(meta.get("step", 0), loader, meter, log, saver, flops_per_token)
        finally:
            loader.close()
            if log is not None:
                log.close()


@contextlib.contextmanager
def closing(saver: checkpoint.Saver) -> Iterator[checkpoint.Saver]:
    """Close it on the way out; after another error, one of the last write goes unsaid."""
    try:
        yield saver
    except BaseException:
        with contextlib.suppress(OSError):
            saver.close()
        raise
    saver.close()


@dataclass
class _Run:
    """What the loop and its once-in-a-while parts share."""

    config: TrainConfig
    run_dir: Path
    vocab: Vocabulary
    model: Transformer
    twin: Twin
    optimizer: torch.optim.AdamW
    identity: dict[str, Any]
    device: torch.device
    precision: str
    total: int
    window: dict[str, list[float]]
    init_step: int | None
    git: dict[str, Any]  # of the code that runs, at its start
    noise: bool  # Gumbel-sigmoid, on the routers' logits
    upcycled: dict[str, Any] | None  # what `moma upcycle` wrote about the seed
    ranks: Ranks
    skipped: int  # steps so far
    causal: float  # FLOPs with the causal half of attention, as a share of those with attention in full
    stop_asked: bool = False
    recent: dict[int, list[MicroBatch]] = field(default_factory=dict)  # by step, until its loss has been looked at

    def loop(
        self,
        step: int,
        loader: Loader,
        meter: Meter,
        log: RunLog | None,
        saver: checkpoint.Saver,
        flops_per_token: float,
    ) -> int:
        """Steps until `total` or a signal; the step itself is the block between the rulers. `log`: the first rank's."""
        config, model, stream = self.config, self.twin.model, iter(loader)
        objective = OBJECTIVES[config.objective.kind][1]
        units = (config.data.tokens_per_step, flops_per_token)
        eval_every = config.eval.interval and max(1, config.eval.interval.to_steps(*units, self.total))
        save_every = max(1, config.checkpoint.interval.to_steps(*units, self.total))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        joint = config.objective.trains_model and config.objective.needs_aux_routers
        aux_parameters = [p for name, p in trained if joint and is_aux(name)]
        parameters = [p for name, p in trained if not (joint and is_aux(name))]
        progress = Progress(config.objective.kind, self.total, step) if log is not None else None
        data_state = loader.state or {}
        window = {name: torch.tensor(tally, device=self.device) for name, tally in self.window.items()}
        trace = Trace(config.profile, self.run_dir / "profile", self.ranks.rank)
        late, patience, stop = Late(), 1 if self.device.type == "cuda" else 0, False
        with self._signals():
            while step < self.total and not stop:
                logs = (step + 1) % config.log.interval == 0 or step + 1 == self.total
                saves = (step + 1) % save_every == 0 or step + 1 == self.total
                trace.before(step)
                # ---- one step ---------------------------------------------------------------------------------
                with meter.time("data_wait"):
                    own, denominator, data_state, self.recent[step + 1] = next(stream)
                    batches = [batch.to(self.device) for batch in own]
                with meter.time("train"):
                    observed: dict[str, State] = {}
                    counted: Tallies = {}
                    # whether a process is asked to stop, and whether each micro-batch's loss is not finite
                    told = torch.zeros(1 + config.data.accumulation, device=self.device)
                    for batch in batches:
                        send_gradients(model, batch is batches[-1])
                        begin_pass(config.parallel, self.model.parameters())
                        with autocast(self.precision, self.device):
                            loss, tallies, seen = objective(
                                config.objective, model, batch, denominator, self.vocab, logs, self._drawn(batch)
                            )
                        (loss * self.ranks.world).backward()
                        told[1 + batch.number % config.data.accumulation] = ~loss.detach().isfinite()
                        _add(counted, tallies)
                        _add_observed(observed, seen, config.data.accumulation)
                    if self.stop_asked:
                        told[:1].fill_(1)
                    copies = [p.grad for _, p in trained if p.grad is not None and not isinstance(p, DTensor)]
                    average_([told, *copies], REDUCE_DTYPES[config.parallel.reduce_dtype])
                    if logs:
                        counted |= self._router_gradients()
                        by_part = norms_by_part(trained, self.ranks.world, config.parallel.replicas)
                        sum_(by_part.values())
                        counted |= {f"grad_norm/{part}": _one(square.sqrt()) for part, square in by_part.items()}
                    grad_norm = clip_(parameters, config.optim.clip_norm)
                    finite = grad_norm.isfinite()
                    if aux_parameters:  # their gradients never change how the model's are clipped
                        finite &= clip_(aux_parameters, config.optim.clip_norm).isfinite()
                    if logs:
                        counted["grad_norm"] = _one(grad_norm)
                    late.send(step + 1, torch.cat([told, ~finite[None]]))
                    skip = told[1:].any() | ~finite
                    lr = learning_rate(step, self.total, config.optim, *units)
                    set_learning_rate(self.optimizer, lr)
                    step_(self.optimizer, skip)
                    if config.objective.trains_model:
                        self.twin.refresh()
                    self.optimizer.zero_grad(set_to_none=True)
                    sum_([values for state in observed.values() for values in state.values()])
                    self.model.update_routing(observed, skip)
                    _add(window, {name: torch.where(skip, 0, tally) for name, tally in counted.items()})
                    stop = self._heed(late, 0 if logs or saves else patience)
                step += 1
                meter.add(units[0], units[0] * flops_per_token)
                # -------------------------------------------------------------------------------------------------
                values: dict[str, float] = {}
                if logs:
                    sum_(window[name] for name in sorted(window))  # ranks may have met the names in another order
                    values = _means(window) | {"lr": lr} | meter.rates()  # here the host waits for the device
                    values |= {"micro_batches": step * config.data.accumulation, "skipped_steps": self.skipped}
                    values |= {"memory_gib": _memory_gib(self.device)} | _source_metrics(data_state, loader.plan)
                    if saver.bytes:
                        values |= {"checkpoint_pause_s": saver.pause_s, "checkpoint_write_s": saver.write_s}
                    if "mfu_full" in values:
                        values["mfu_causal"] = values["mfu_full"] * self.causal
                    if step == self.total:
                        values |= meter.seconds()
                    window = {}
                validated: dict[str, float] = {}
                if eval_every and (step % eval_every == 0 or step == self.total):
                    with meter.time("eval"):
                        validated = self._validate()
                if (values or validated) and log is not None and progress is not None:
                    log.metrics(step, values | validated)
                    progress.update(step, _summary(values | validated))
                if saves or stop:
                    stop |= self._heed(late, 0)
                    sum_(window[name] for name in sorted(window))
                    with meter.time("checkpoint"):
                        self._refuse_bad_parameters(step)
                        numbers = torch.stack(list(window.values())).tolist() if window else []
                        self.window = dict(zip(window, numbers, strict=True))
                        self._save(step, data_state, meter, log, saver, validated.get("val_loss"))
                    if self.ranks.rank:  # the first rank keeps the sum
                        window = {name: torch.zeros_like(tally) for name, tally in window.items()}
        trace.close(step)
        saver.wait()
        if progress is None:
            return 0
        progress.close()
        if data_state:
            shares = ((n, v) for n, v in _source_metrics(data_state, loader.plan).items() if n.endswith("share"))
            print("realised shares of tokens: " + ", ".join(f"{n.split('/')[1]} {v:.1%}" for n, v in shares))
            for number, stage in enumerate(loader.plan.shares(data_state) if config.data.stages else []):
                print(f"  in stage {number}: " + ", ".join(f"{n} {v:.1%}" for n, v in stage.items()))
        if step < self.total:
            print(f"stopped after step {step} of {self.total}: run the same command to go on")
        return 0

    def _drawn(self, batch: Batch) -> list[Disturbance] | None:
        """What the routers draw for a micro-batch: in pre-training only."""
        if not self.config.objective.trains_model:
            return None
        return routing_noise(
            self.model, batch.number, batch.tokens_RL.numel(), self.config.seed.init, gumbel=self.noise
        )

    def _validate(self) -> dict[str, float]:
        config = self.config
        if not config.objective.trains_model:
            return {}
        found: dict[str, float] = {}
        modes: list[tuple[Mode, str]] = [("train", "val_"), ("threshold", "val_threshold_")]
        for mode, prefix in modes if self.model.needs_future else modes[:1]:
            batches = validation_batches(config.data.corpus, self.vocab, config.data, config.eval.batches, self.device)
            # the shapes differ; a model beside its twin was never compiled, and its attention may stay so
            compiled = self.twin.model is self.model
            eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
            with autocast(self.precision, self.device), eager:
                metrics = perplexity(self.model, batches, self.vocab, mode)
            found |= {f"{prefix}{name}": value for name, value in metrics.items() if name.startswith("loss")}
        grown = {
            f"router/{router}/similarity_{group}": value
            for router, groups in specialisation(self.model).items()
            for group, value in groups.items()
        }
        return found | grown

    def _router_gradients(self) -> Tallies:
        """L2 norm of every main router's gradient before clipping, as tallies: under post-norm it nearly vanishes for
        tokens that one expert computes."""
        found = {}
        for name, module in self.model.routers().items():
            router = module.depth_router if isinstance(module, DepthBlock) else module.router
            if router is not None and router.grad is not None:
                found[f"router/{name}/grad_norm"] = _one(router.grad.norm())
        return found

    def _heed(self, late: Late, behind: int) -> bool:
        """Take note of what the steps told, but for the last `behind`; whether a process was asked to stop."""
        stop = False
        for step, (asked, *bad, gradient) in late.read(behind):
            stop |= asked > 0
            planned = self.recent.pop(step)
            if any(bad) or gradient:
                named = [micro_batch for micro_batch, flag in zip(planned, bad, strict=True) if flag]
                self._note_skipped(step, "loss" if named else "gradient", named or planned)
        return stop

    def _note_skipped(self, step: int, what: str, planned: list[MicroBatch]) -> None:
        """Count a step that was left out because of these micro-batches and name their documents; raises ValueError
        when there were too many."""
        self.skipped += 1
        numbers = [micro_batch.number for micro_batch in planned]
        if self.ranks.rank == 0:
            found = [{"number": one.number, "documents": documents_of(one)} for one in planned]
            with open(self.run_dir / SKIPPED, "a") as file:
                file.write(json.dumps({"step": step, "what": what, "micro_batches": found}) + "\n")
        if self.skipped > self.config.max_skipped:
            raise ValueError(
                f"got a loss or gradient that is not finite in {self.skipped} steps, the last of them step {step} (its "
                f"{what}, micro-batches {numbers}), need at most max_skipped={self.config.max_skipped}: the documents "
                f"are named in {self.run_dir / SKIPPED}, the last checkpoint in {self.run_dir} is good; mend them, or "
                "lower optim.lr"
            )
        if self.ranks.rank == 0:
            print(
                f"skipped step {step}: its {what} is not finite; the documents of its micro-batches {numbers} are "
                f"named in {self.run_dir / SKIPPED}",
                file=sys.stderr,
            )

    def _refuse_bad_parameters(self, step: int) -> None:
        """Raise ValueError, on every process, for parameters that are not finite: no step mends them."""
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        bad = torch.stack([~p.detach().isfinite().all() for p in local]).any().float()
        sum_([bad])
        if bad:
            raise ValueError(
                f"got parameters that are not finite after step {step}, need finite ones: the last checkpoint in "
                f"{self.run_dir} is good, run the same command to go on from it; lower optim.lr if it happens again"
            )

    def _save(
        self,
        step: int,
        data_state: Any,
        meter: Meter,
        log: RunLog | None,
        saver: checkpoint.Saver,
        val_loss: float | None,
    ) -> None:
        meta = {
            **provenance(self.identity, self.git),
            "data": data_state,
            "meter": meter.state(),
            "metrics_offset": log.offset() if log is not None else None,  # the first rank's meta is the one written
            "window": self.window,  # tallies since the last line, so that the next one is the same after a resume
            "wandb_id": log.wandb_id if log is not None else None,
            "total_steps": self.total,
            "init_step": self.init_step,  # of the run that init_from names
            "upcycled": self.upcycled,
            "skipped": self.skipped,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,  # of this very step
        }
        state = {
            "model": checkpoint.model_state(self.model),
            "optimizer": checkpoint.optimizer_state(self.model, self.optimizer),
        }
        saver.save(step, state, meta)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save and end the run in order; one that comes later kills as usual.

        Within SAME_S a second one is the same request, which came by two ways.
        """
        asked = -math.inf

        def ask(number: int, frame: Any) -> None:
            nonlocal asked
            if self.stop_asked and time.monotonic() - asked > SAME_S:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)
            elif not self.stop_asked:
                self.stop_asked, asked = True, time.monotonic()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def print_plan(
        self,
        model: Transformer,
        flops: dict[str, float],
        per_token: float,
        sources: dict[str, Any],
        meta: dict[str, Any],
    ) -> None:
        """What is about to happen, in a few lines; `model`: on the meta device."""
        config, step = self.config, meta.get("step", 0)
        data, per_step = config.data, config.data.tokens_per_step
        image = data.modality_shares(self.vocab)[1]
        corpus = sum(int(s.document_tokens.sum()) for s in sources.values())
        begin = f"resume at step {step}" if step else "start"
        each = "each" if data.balance else "on average, not balanced"
        print(
            f"{self.run_dir}: {begin}, {self.total} steps of {per_step} tokens "
            f"({data.accumulation} x {data.rows} rows x {data.row_length}, {data.images} images {each}, "
            f"{image:.0%} image tokens), corpus {corpus / 1e6:.2f} M tokens\n"
            f"  {flops['params_total'] / 1e6:.2f} M parameters, {flops['params_active'] / 1e6:.2f} M active, "
            f"{per_token / 1e6:.1f} MFLOP per token, {self.precision} on {self.device}, "
            f"{torch.get_num_threads()} threads"
        )
        parts = self.ranks.world // config.parallel.replicas if config.parallel.shard else 1
        shape = (data.rows, data.row_length, data.images)
        stored = (config.optim.state_dtype, config.optim.grad_dtype)
        memory = step_memory(model, self.vocab, *shape, self.precision, config.parallel.recompute, parts, *stored)
        copies = (
            f"{self.ranks.world} processes, {f'in {parts} parts' if parts > 1 else 'each a copy'}, "
            if self.ranks.world > 1
            else ""
        )
        print(
            f"  {copies}about {memory['peak'] / 2**30:.2f} GiB each (eager): parameters, gradients and AdamW "
            f"{sum(memory[kind] for kind in (*RESIDENT, 'gradients')) / 2**30:.2f}, activations "
            f"{memory['activations'] / 2**30:.2f}"
        )
        left, rate = (self.total - step) * per_step * per_token, _pace(meta.get("meter"))
        peak = peak_flops(config.parallel, self.device, self.ranks.world)
        if rate:
            print(f"  {clock(left / rate)} left at the pace so far")
        elif peak:
            print(f"  {clock(left / peak / 0.4)} at 40 % of the peak of the devices")


def _pace(meter: dict[str, Any] | None) -> float | None:
    """FLOP/s of a run so far, all its work counted."""
    return meter["flops"] / sum(meter["seconds"].values()) if meter and sum(meter["seconds"].values()) else None


def _add(window: Tallies, tallies: Tallies) -> None:
    for name, tally in tallies.items():
        window[name] = window[name] + tally.detach() if name in window else tally.detach()


def _one(value: Tensor) -> Tensor:
    """A tally that counted one value."""
    return torch.stack([value, torch.ones_like(value)])


def _forget_skipped(path: Path, step: int) -> None:
    """Leave out what was skipped after `step`: these steps are run again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU by tensors, else of the host by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _add_observed(total: dict[str, State], seen: dict[str, State], parts: int) -> None:
    """Add one of `parts` micro-batches to the mean of what the routers observed."""
    for router, state in seen.items():
        own = total.setdefault(router, {})
        for name, values in state.items():
            own[name] = own[name] + values / parts if name in own else values / parts


def _means(window: Tallies) -> dict[str, float]:
    """One transfer for all tallies; a tally that counted nothing is left out."""
    sums = torch.stack(list(window.values())).double().cpu().tolist()
    return {name: total / count for name, (total, count) in zip(window, sums, strict=True) if count}


def _source_metrics(state: dict[str, Any], plan: Plan) -> dict[str, float]:
    """Passes, tokens and realised share of every source up to a state of the plan."""
    total = max(1, sum(state["tokens"].values()))
    values: dict[str, float] = {}
    for name, source in plan.sources.items():
        values[f"data/{name}/passes"] = state["pass"][name] + state["position"][name] / source.n_documents
        values[f"data/{name}/tokens"] = state["tokens"][name]
        values[f"data/{name}/share"] = state["tokens"][name] / total
    return values


def _summary(values: dict[str, float]) -> str:
    names = ("loss", "loss_text", "loss_image", "aux_loss", "val_loss", "tokens_per_second")
    return " ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
