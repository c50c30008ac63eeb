"""Shared by every test: one torch thread, small vocabularies, feed-forward variants, made-up micro-batches.

A test that takes the argument `variant` runs once per entry of `VARIANTS`; in a module with LAYERS_ONLY, once per
entry with a feed-forward of its own. Every selection rule of `SELECTIONS` has its entry. Micro-batches have exact
counts: the same number of image (and audio) tokens whatever the seed, hence the same shapes.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moma.modality import IGNORE, TokenGroups, Vocabulary, exact_groups, padded_groups
from moma.model.attention import AttentionConfig, SharedAttentionConfig, UntiedAttentionConfig, document_mask
from moma.model.depth import DepthConfig, FullDepthConfig
from moma.model.feed_forward import DenseConfig, FeedForwardConfig, SparseConfig
from moma.model.routing import SELECTIONS
from moma.model.routing.threshold import ThresholdConfig
from moma.model.routing.token_choice import TokenChoiceConfig
from moma.model.transformer import Architecture, ModelConfig, Transformer, build_model

torch.set_num_threads(1)

SMALL = dict(size=64, bos=0, pad=1, eos=2, boi=21, eoi=20, image_start=4, image_stop=20, text_start=24, text_stop=56)
VOCABULARY = Vocabulary(**SMALL, image_grid=(2, 2), hash="0" * 16)  # type: ignore[arg-type]
THREE_MODALITIES = Vocabulary(
    **SMALL,  # type: ignore[arg-type]
    image_grid=(2, 2),
    hash="1" * 16,
    extra_modalities=(("audio", 56, 64),),
)


@dataclass(frozen=True)
class Variant:
    """A feed-forward, what else is special about the model, and the vocabulary whose modalities it names."""

    feed_forward: FeedForwardConfig
    vocabulary: Vocabulary = VOCABULARY
    attention: AttentionConfig = SharedAttentionConfig()
    depth: FullDepthConfig | DepthConfig = FullDepthConfig()

    @property
    def groups(self) -> dict[str, int]:
        """Experts per group of the first sparse layer; a dense layer is one group of one."""
        sparse = isinstance(self.feed_forward, SparseConfig)
        return self.feed_forward.groups(self.vocabulary.modalities) if sparse else {"all": 1}

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(self.groups.values())

    @property
    def n_routed(self) -> int:
        """Experts behind a router."""
        return sum(size for size in self.group_sizes if size > 1)

    @property
    def sees_future(self) -> bool:
        """Whether its training rule looks at later tokens."""
        sparse = isinstance(self.feed_forward, SparseConfig) and self.n_routed > 0
        return isinstance(self.depth, DepthConfig) or (
            sparse and SELECTIONS[self.feed_forward.selection.kind].alone is None
        )


FOUR_FOUR = {"text": 4, "image": 4}
VARIANTS = {
    "dense": Variant(DenseConfig()),
    "moe_8x": Variant(SparseConfig({"all": 8})),
    "moe_1t1i": Variant(SparseConfig({"text": 1, "image": 1})),
    "moe_4t4i": Variant(SparseConfig(FOUR_FOUR)),
    "moe_7t1i": Variant(SparseConfig({"text": 7, "image": 1})),
    "moe_2t4i_shared": Variant(SparseConfig({"text": 2, "image": 4}, width=0.5, shared=1)),
    "three_modalities": Variant(SparseConfig({"text": 3, "image": 2, "audio": 1}), THREE_MODALITIES),
    "token_choice_4x": Variant(SparseConfig({"all": 4}, selection=TokenChoiceConfig(k=2, weights="renormalised"))),
    "threshold": Variant(SparseConfig(FOUR_FOUR, selection=ThresholdConfig(warmup_steps=1, bound=4.0))),
    "untied_4t4i": Variant(SparseConfig(FOUR_FOUR), attention=UntiedAttentionConfig()),
    "untied_dense_3": Variant(DenseConfig(), THREE_MODALITIES, attention=UntiedAttentionConfig()),
    "mod_dense": Variant(DenseConfig(), depth=DepthConfig(capacity=0.5)),
    "mod_4t4i": Variant(SparseConfig(FOUR_FOUR), depth=DepthConfig(capacity=0.5)),
    "mod_quota_untied": Variant(
        SparseConfig({"text": 2, "image": 2}), depth=DepthConfig("mod_quota", 0.5), attention=UntiedAttentionConfig()
    ),
}
VARIANTS |= {
    kind: Variant(SparseConfig(FOUR_FOUR, selection=rule.config()))
    for kind, rule in SELECTIONS.items()
    if kind not in ("expert_choice", *VARIANTS)
}
# a layer of its own: what differs in attention or depth alone is the same feed-forward
LAYERS = {name: v for name, v in VARIANTS.items() if v == Variant(v.feed_forward, v.vocabulary)}


class MicroBatch(NamedTuple):
    """Rows of packed documents with everything a model needs."""

    tokens_RL: Tensor
    target_RL: Tensor
    position_RL: Tensor
    document_RL: Tensor
    mask: Any
    groups: TokenGroups


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="store the golden run's losses anew")


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: the collector need not look through it time and again, nor after every
    few hundred of the objects that a traced graph consists of."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        cases = LAYERS if getattr(metafunc.module, "LAYERS_ONLY", False) else VARIANTS
        metafunc.parametrize("variant", cases.values(), ids=cases.keys())


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Two modalities, 64 ids, 2 x 2 image codes per image."""
    return VOCABULARY


@pytest.fixture(scope="session")
def three_modalities() -> Vocabulary:
    """The same with a third modality, `audio`."""
    return THREE_MODALITIES


@pytest.fixture(scope="session")
def variants() -> dict[str, Variant]:
    """All of `VARIANTS`, for tests that name one."""
    return VARIANTS


def _row(vocab: Vocabulary, length: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of one row: an image document and a text document in random order."""

    def draw(start: int, stop: int, n: int) -> list[int]:
        return torch.randint(start, stop, (n,), generator=generator).tolist()

    image = [vocab.boi, *draw(vocab.image_start, vocab.image_stop, vocab.tokens_per_image), vocab.eoi]
    extra = [i for _, start, stop in vocab.extra_modalities for i in draw(start, stop, 3)]
    caption = int(torch.randint(0, 4, (), generator=generator))
    words = draw(vocab.text_start, vocab.text_stop, caption)
    first = [vocab.bos, *words, *image, vocab.eos]
    filler = length - len(first) - len(extra) - 2
    words = draw(vocab.text_start, vocab.text_stop, filler)
    cut = filler // 2
    second = [vocab.bos, *words[:cut], *extra, *words[cut:], vocab.eos]
    documents = [first, second] if torch.randint(0, 2, (), generator=generator) else [second, first]
    return sum(documents, []), sum(([n] * len(d) for n, d in enumerate(documents)), [])


def batch_of(tokens_RL: Tensor, document_RL: Tensor, vocab: Vocabulary) -> MicroBatch:
    """The micro-batch of given tokens and document numbers (0, 1, ... in each row; -1 = padding)."""
    n_rows, length = tokens_RL.shape
    same = document_RL[:, 1:] == document_RL[:, :-1]
    target_RL = torch.full_like(tokens_RL, IGNORE)
    target_RL[:, :-1] = torch.where(same & (document_RL[:, 1:] >= 0), tokens_RL[:, 1:], IGNORE)
    position_RL = torch.arange(length).expand(n_rows, length).contiguous()
    present = document_RL >= 0
    groups = exact_groups(tokens_RL, vocab) if present.all() else padded_groups(tokens_RL, present, vocab)
    return MicroBatch(tokens_RL, target_RL, position_RL, document_RL, document_mask(document_RL), groups)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., MicroBatch]:
    """`make_batch(vocabulary, seed, rows=3, length=25)`: made-up documents, exact counts for every seed."""

    def make(vocab: Vocabulary, seed: int, rows: int = 3, length: int = 25) -> MicroBatch:
        generator = torch.Generator().manual_seed(seed)
        made = [_row(vocab, length, generator) for _ in range(rows)]
        return batch_of(torch.tensor([m[0] for m in made]), torch.tensor([m[1] for m in made]), vocab)

    return make


@pytest.fixture(scope="session")
def rebuild() -> Callable[[Tensor, Tensor, Vocabulary], MicroBatch]:
    """`rebuild(tokens_RL, document_RL, vocabulary)`: the micro-batch of planted tokens."""
    return batch_of


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """`make_model(variant, seed=0, dtype=float64, aux_routers=False, **ModelConfig fields)`: two small layers."""

    def make(
        variant: Variant,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        aux_routers: bool = False,
        **fields: Any,
    ) -> Transformer:
        config = ModelConfig(**{"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, **fields})
        vocab = variant.vocabulary
        return build_model(
            Architecture(config, variant.feed_forward, variant.attention, variant.depth),
            vocab.size,
            vocab.modalities,
            seed=seed,
            aux_routers=aux_routers,
            dtype=dtype,
        )

    return make


@pytest.fixture(scope="session")
def settle() -> Callable[[Transformer, MicroBatch], None]:
    """`settle(model, batch)`: routing state of one training step on the micro-batch, cut-offs a little off it.

    Exactly there they may lie on a logit that several tokens share up to its last bits (every BOS)."""

    def settled(model: Transformer, batch: MicroBatch) -> None:
        with torch.no_grad():
            _, stats = model(batch.tokens_RL, batch.position_RL, batch.mask, batch.groups)
        model.update_routing({router: s.observed for router, s in stats.items()})
        generator = torch.Generator().manual_seed(0)
        for name, buffer in model.named_buffers():
            if name.endswith("cutoff"):
                buffer += 0.03 * torch.randn(buffer.shape, generator=generator).to(buffer.dtype)

    return settled
