"""The plan: exact counts, every token once per pass, images whole, pure in its inputs."""

from collections import Counter

import numpy as np
import pytest

from moma.data.plan import Plan, PlanShape, pass_order


class Index:
    """A source by its segment lengths: documents = [[(tokens, images), ...], ...]."""

    def __init__(self, documents):
        self.documents = documents
        self.n_documents = len(documents)
        self.document_tokens = np.array([sum(t for t, _ in d) for d in documents], dtype=np.int64)
        self.document_images = np.array([sum(i for _, i in d) for d in documents], dtype=np.int32)

    def segments(self, doc):
        tokens, images = zip(*self.documents[doc], strict=True)
        return np.cumsum([0, *tokens]), np.array(images)


def corpus(seed=0, pairs=60, texts=40, interleaved=20):
    rng = np.random.default_rng(seed)
    pair = [[(int(rng.integers(12, 20)), 1)] for _ in range(pairs)]
    text = [[(int(n), 0) for n in rng.integers(3, 90, size=rng.integers(1, 4))] for _ in range(texts)]
    mixed = []
    for _ in range(interleaved):
        kinds = rng.integers(0, 2, size=rng.integers(2, 9))
        mixed.append([(int(rng.integers(10, 24)), 1) if k else (int(rng.integers(5, 120)), 0) for k in kinds])
        mixed[-1].append((14, 1))
    return {"pair": Index(pair), "text": Index(text), "mixed": Index(mixed)}


SHAPE = PlanShape(rows=4, row_length=64, images=5)


def collect(plan, n):
    return [batch for batch, _ in zip(plan.run(), range(n), strict=False) for batch in [batch[0]]]


def test_constant_counts_over_1000_micro_batches():
    for batch in collect(Plan(corpus(), SHAPE, seed=0), 1000):
        assert batch.exact and batch.images == 5
        assert [sum(p.tokens for p in row) for row in batch.rows] == [64] * 4


def test_each_token_once_per_pass_and_images_whole():
    sources = corpus()
    plan = Plan(sources, SHAPE, seed=0)
    seen = Counter()
    passes = {}
    for batch, state in plan.run():
        for row in batch.rows:
            for piece in row:
                seen.update((piece.source, piece.doc, t) for t in range(piece.start, piece.stop))
                offsets, images = sources[piece.source].segments(piece.doc)
                inside = 0
                for a, b, n in zip(offsets[:-1], offsets[1:], images, strict=True):
                    if n:  # a segment with an image is in the piece whole or not at all
                        assert (piece.start <= a and b <= piece.stop) or b <= piece.start or piece.stop <= a
                        inside += int(n) if piece.start <= a and b <= piece.stop else 0
                assert inside == piece.images
        passes = state["pass"]
        if batch.number == 300:
            break
    assert min(passes.values()) >= 2
    for name, source in sources.items():
        counts = np.array(
            [seen[(name, d, t)] for d in range(source.n_documents) for t in range(source.document_tokens[d])]
        )
        # complete passes, plus at most one unfinished pass and what waits
        assert counts.min() >= passes[name] - 1 and counts.max() <= passes[name] + 1


def test_finite_stream_gives_every_token_exactly_once():
    sources = corpus()
    plan = Plan(sources, SHAPE, seed=0, passes=1)
    seen = Counter()
    batches = [batch for batch, _ in plan.run()]
    for batch in batches:
        assert batch.images <= 5
        for row in batch.rows:
            assert sum(p.tokens for p in row) <= 64
            for piece in row:
                seen.update((piece.source, piece.doc, t) for t in range(piece.start, piece.stop))
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == sum(int(s.document_tokens.sum()) for s in sources.values())
    assert batches[0].exact and not batches[-1].exact


def test_last_marks_exactly_the_document_ends():
    sources = corpus()
    for batch, _ in Plan(sources, SHAPE, seed=0, passes=1).run():
        for row in batch.rows:
            for p in row:
                assert p.last == (p.stop == sources[p.source].document_tokens[p.doc])


def test_pure_function_resume_and_random_access():
    straight = collect(Plan(corpus(), SHAPE, seed=3), 600)
    again = Plan(corpus(), SHAPE, seed=3)
    stream = again.run()
    for _ in range(100):
        _, state = next(stream)
    resumed = Plan(corpus(), SHAPE, seed=3).run(state)
    assert [next(resumed)[0] for _ in range(50)] == straight[100:150]
    walked = Plan(corpus(), SHAPE, seed=3)
    assert walked.micro_batch(599) == straight[599]
    assert walked.micro_batch(7) == straight[7]
    assert len(walked._states) == 3  # looking back starts at most 256 micro-batches away
    assert collect(Plan(corpus(), SHAPE, seed=4), 5) != straight[:5]


def test_running_the_plan_does_not_touch_the_state_it_started_from():
    plan = Plan(corpus(), SHAPE, seed=0)
    _, state = next(plan.run())
    first = [b for (b, _), _ in zip(plan.run(state), range(5), strict=False)]
    assert first == [b for (b, _), _ in zip(plan.run(state), range(5), strict=False)]


def test_weights_order_image_sources_and_text_sources_apart():
    plan = Plan(corpus(), SHAPE, seed=0, mixture={"pair": 3.0, "mixed": 1.0})
    images = Counter()
    for batch in collect(plan, 400):
        for row in batch.rows:
            for piece in row:
                images[piece.source] += piece.images
    assert images["pair"] / images["mixed"] == pytest.approx(3.0, rel=0.03)
    assert set(Plan(corpus(), SHAPE, seed=0, mixture={"mixed": 0}).sources) == {"pair", "text"}


def test_identity_changes_with_everything_it_depends_on():
    base = Plan(corpus(), SHAPE, seed=0).identity("corpus", "vocab")
    others = [
        Plan(corpus(), SHAPE, seed=1).identity("corpus", "vocab"),
        Plan(corpus(), PlanShape(4, 64, 4), seed=0).identity("corpus", "vocab"),
        Plan(corpus(), SHAPE, seed=0, mixture={"pair": 9.0}).identity("corpus", "vocab"),
        Plan(corpus(), SHAPE, seed=0).identity("other", "vocab"),
        Plan(corpus(), SHAPE, seed=0).identity("corpus", "other"),
    ]
    assert base not in others and len(set(others)) == 5
    assert base == Plan(corpus(), SHAPE, seed=0).identity("corpus", "vocab")


def test_pass_order_is_a_permutation_that_the_key_fixes():
    order = pass_order(1000, "0/text/0")
    assert sorted(order) == list(range(1000))
    assert order[:5].tolist() == pass_order(1000, "0/text/0")[:5].tolist() != pass_order(1000, "0/text/1")[:5].tolist()


@pytest.mark.parametrize(
    ("shape", "mixture", "text"),
    [
        (PlanShape(1, 64, 6), {}, r"got images=6 per micro-batch, need at most 5: .* set data.images<=5"),
        (PlanShape(1, 64, 0), {}, r"got images=0, but \['mixed', 'pair'\] hold images"),
        (SHAPE, {"pair": 0, "mixed": 0}, r"got images=5 per micro-batch, need a source with images"),
        (SHAPE, {"text": 0}, r"need one to fill the rows exactly"),
        (SHAPE, {"pears": 1}, r"got mixture weights for \['pears'\], need names among"),
        (SHAPE, {"pair": -1}, r"got negative mixture weights for \['pair'\]"),
    ],
)  # fmt: skip
def test_impossible_requests_are_refused(shape, mixture, text):
    with pytest.raises(ValueError, match=text):
        Plan(corpus(), shape, seed=0, mixture=mixture)


def test_segments_that_cannot_stand_in_a_row_are_refused():
    sources = {"mixed": Index([[(70, 1), (3, 0)], [(10, 1)]]), "text": Index([[(50, 0)]])}
    with pytest.raises(ValueError, match=r"got an image segment of 70 tokens .* need at most data.row_length=64"):
        collect(Plan(sources, SHAPE, seed=0), 10)
    sources = {"mixed": Index([[(30, 6)], [(10, 1)]]), "text": Index([[(50, 0)]])}
    with pytest.raises(ValueError, match=r"got a segment with 6 images .* need at most data.images=5"):
        collect(Plan(sources, SHAPE, seed=0), 10)
    with pytest.raises(ValueError, match=r"got rows=0"):
        PlanShape(0, 64, 1)
    with pytest.raises(ValueError, match=r"got images=9 .* an image brings \d+ tokens of its documents on average"):
        wordy = {"mixed": Index([[(8, 1)], [(60, 1)], [(50, 1)]]), "text": Index([[(50, 0)]])}
        Plan(wordy, PlanShape(4, 64, 9), seed=0)
    even = {"mixed": Index([[(10, 2)], [(12, 2)]]), "text": Index([[(50, 0)]])}
    with pytest.raises(ValueError, match=r"need a number the documents add up to"):
        collect(Plan(even, SHAPE, seed=0), 10)


def test_a_finite_stream_leaves_no_large_piece_behind():
    """Pieces that leave no room for Q images in any micro-batch come at the end, with fewer images."""
    sources = {"mixed": Index([[(62, 1)] for _ in range(7)] + [[(8, 1)] for _ in range(9)]), "text": Index([[(50, 0)]])}
    seen = Counter()
    for batch, _ in Plan(sources, PlanShape(1, 64, 3), seed=0, passes=1).run():
        seen.update((p.source, p.doc) for row in batch.rows for p in row for _ in range(p.tokens))
    assert sum(seen.values()) == 7 * 62 + 9 * 8 + 50 and len(seen) == 17


def test_a_piece_that_fits_no_micro_batch_is_refused_at_once():
    sources = {"mixed": Index([[(62, 1)]] + [[(8, 1)] for _ in range(99)]), "text": Index([[(50, 0)]])}
    with pytest.raises(ValueError, match=r"got an image piece of 62 tokens .* leaves room for 2 further images"):
        collect(Plan(sources, PlanShape(1, 64, 3), seed=0), 200)


def test_text_around_pictures_counts_when_q_is_checked():
    """One image per 320 tokens cannot give 3 images in 128 tokens, however small its own segment is."""
    wordy = {"mixed": Index([[(310, 0), (10, 1)] for _ in range(20)]), "text": Index([[(50, 0)]])}
    with pytest.raises(ValueError, match=r"got images=3 per micro-batch, need at most 0: an image brings 320 tokens"):
        Plan(wordy, PlanShape(2, 64, 3), seed=0)


def test_state_counts_the_tokens_of_every_source():
    counted = Counter()
    states = []
    for batch, state in Plan(corpus(), SHAPE, seed=0).run():
        states.append(state["tokens"])
        for row in batch.rows:
            for piece in row:
                counted[piece.source] += piece.tokens
        if batch.number == 50:
            break
    assert states[-1] == counted and sum(counted.values()) == 51 * 4 * 64
