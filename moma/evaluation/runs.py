"""A run folder back as a model: what `moma evaluate` and `moma generate` both begin with.

    run/checkpoints/step-N/   meta.json --ModelConfig, feed-forward, objective--> model     tensors, strictly --> model
                              meta.json --tokenizer name--> asset, whose hash must be the checkpoint's

The model is built on the meta device and filled from the newest checkpoint; it has auxiliary routers exactly if the
run trained them. Refuses a run without a checkpoint, a tokenizer that has changed since, and to name the corpus of an
import, which has none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moma import checkpoint
from moma.modality import Vocabulary
from moma.model.transformer import ARCHITECTURE, Architecture, Transformer
from moma.objectives import OBJECTIVES
from moma.schema import build
from moma.tokenizer.vocab import asset_folder, load_vocabulary


@dataclass(frozen=True)
class LoadedRun:
    """The newest checkpoint of `run_dir`: `tokenizer` is its asset folder, `meta` its meta.json."""

    model: Transformer
    vocab: Vocabulary
    tokenizer: Path
    run_dir: Path
    checkpoint: Path
    meta: dict[str, Any]

    @property
    def corpus(self) -> Path:
        """The corpus the run was trained on; ValueError for an import."""
        if "data" not in self.meta["config"]:
            raise ValueError(
                f"got {self.run_dir}, an import without a corpus of its own, need a trained run for held-out "
                "documents: give prompts or pictures"
            )
        return Path(self.meta["config"]["data"]["corpus"])

    @property
    def step(self) -> int:
        """Optimizer steps behind the parameters."""
        return self.meta["step"]

    @property
    def precision(self) -> str:
        """The precision the run was trained in: bf16 or fp32."""
        return self.meta["precision"]


def load_run(run_dir: Path, device: torch.device | str) -> LoadedRun:
    """Model of a run's newest checkpoint on `device`, in evaluation mode, without gradients.

    Raises ValueError without a checkpoint, for another tokenizer than the run's, and for damaged files.
    """
    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is None:
        raise ValueError(f"got {run_dir} without a checkpoint, need a trained run: give the folder of `moma train`")
    meta = checkpoint.read_meta(newest)
    config = meta["config"]
    tokenizer = asset_folder(config["tokenizer"])
    vocab = load_vocabulary(tokenizer)
    if vocab.hash != meta["vocab_hash"]:
        raise ValueError(
            f"got tokenizer {tokenizer} with hash {vocab.hash}, need the one {newest} was trained with, hash "
            f"{meta['vocab_hash']}: restore that tokenizer, or train again"
        )
    objective = config["objective"]
    with torch.device("meta"):
        model = Transformer(
            build(Architecture, {name: config[name] for name in ARCHITECTURE}),
            vocab.size,
            vocab.modalities,
            build(OBJECTIVES[objective["kind"]][0], objective, "objective").needs_aux_routers,
        )
    model.to_empty(device=device)
    checkpoint.load(newest, {"model": checkpoint.model_state(model)})
    model.eval().requires_grad_(False)
    return LoadedRun(model, vocab, tokenizer, run_dir, newest, meta)
