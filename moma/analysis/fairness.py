"""What makes a comparison less than equal: files of other checkpoints, other budgets, other settings.

A warning is one sentence with both numbers. What an older version did not record says nothing.
"""

from collections.abc import Iterable, Sequence

from moma.analysis.runs import Run
from moma.analysis.speedup import paired, sparse_variants

_SETTINGS = ("model", "data", "optim", "precision", "vocab_hash")  # equal in the two runs of a pair


def unfair(runs: Sequence[Run]) -> Iterable[str]:
    """What makes the comparison less than equal: stale files first, then unequal pairs."""
    for run in runs:
        yield from _stale(run)
    for variant in sparse_variants(runs):
        for dense, sparse in paired(runs, variant):
            a, b = float(dense.metrics["flops"][-1]), float(sparse.metrics["flops"][-1])
            if abs(a - b) > 0.01 * max(a, b):
                yield f"Training FLOPs differ: {variant} had {b / a:.2f} times those of dense (seed {dense.seed[1]})."
            batches = [run.eval.get("micro_batches") for run in (dense, sparse) if run.eval]
            if len(set(batches)) > 1:
                yield f"Held-out sets differ: {batches} micro-batches for dense and {variant} (seed {dense.seed[1]})."
            if names := _differing(dense, sparse):
                yield f"Settings differ beside the feed-forward: {', '.join(names)} ({variant}, seed {dense.seed[1]})."


def _stale(run: Run) -> Iterable[str]:
    """What is unfinished, or was made from another checkpoint than the newest; a step that is not recorded says
    nothing."""
    if run.unfinished:
        yield f"{run.name} (seed {run.seed[1]}) is no finished run: {run.unfinished}."
    one = run.evaluated
    at, newest = (one.eval or {}).get("step"), one.meta.get("step")
    if None not in (at, newest) and at != newest:
        yield (
            f"{one.name} (seed {run.seed[1]}) was evaluated at step {at}, its newest checkpoint is step {newest}: "
            "run moma evaluate again."
        )
    if run.routers:
        at, newest = run.routers.meta.get("init_step"), run.meta.get("step")
        if None not in (at, newest) and at != newest:
            yield (
                f"{run.routers.name} (seed {run.seed[1]}): routers start from step {at} of the base, whose newest "
                f"checkpoint is step {newest}: train them again in a new folder."
            )


def _differing(dense: Run, sparse: Run) -> list[str]:
    """Settings that both runs recorded and that are not the same; the duration shows in the FLOPs."""
    a, b = dense.config, sparse.config
    if "plan" in a and "plan" in b:  # what the micro-batches hold, wherever the corpus lies
        a, b = ({**c, "data": {**c.get("data", {}), "corpus": c["plan"]}} for c in (a, b))
    return [name for name in _SETTINGS if name in a and name in b and a[name] != b[name]]
