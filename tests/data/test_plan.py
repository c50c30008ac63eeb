"""The plan: exact counts, every token once per pass, images whole, pure in its inputs."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from moma.data.plan import Plan, PlanShape, documents_of, pass_order


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


@pytest.mark.parametrize(
    ("options", "identity", "stream"),
    [
        ({}, "e2fe4abb041962e8", "65c3f3849aa1740d"),
        ({"mixture": {"pair": 3.0, "mixed": 1.0}}, "5887e863df73d381", "6b5f1e0f3bf8fc80"),
        ({"passes": 1}, "5fd33c83614ce556", "88b9e7e0ce0e763f"),
    ],
)  # fmt: skip
def test_plans_are_those_of_plan_version_1(options, identity, stream):
    """Other bytes here are another plan: runs could not be resumed; raise PLAN_VERSION."""
    plan = Plan(corpus(), SHAPE, seed=0, **options)
    hashed = hashlib.sha256()
    for batch in collect(plan, 300):
        hashed.update(json.dumps([batch.rows, batch.exact]).encode())
    assert (plan.identity("corpus", "vocab"), hashed.hexdigest()[:16]) == (identity, stream)


def test_a_source_without_documents_is_left_out():
    sources = corpus() | {"none": Index([])}
    plan = Plan(sources, SHAPE, seed=0, passes=1)
    assert list(plan.sources) == ["mixed", "pair", "text"]
    assert collect(plan, 99) == collect(Plan(corpus(), SHAPE, seed=0, passes=1), 99)


def test_documents_of_a_micro_batch_are_plain_json():
    batch = Plan(corpus(), SHAPE, seed=0).micro_batch(11)
    told = json.loads(json.dumps(documents_of(batch)))
    pieces = [piece for row in batch.rows for piece in row]
    assert told == [[p.source, p.doc, p.start, p.stop] for p in pieces] and len(told) > 4
    assert sum(stop - start for _, _, start, stop in told) == 4 * 64


STAGES = [(100, {"pair": 1.0, "mixed": 3.0, "prose": 1.0, "text": 0}), (160, {"mixed": 0, "prose": 2.0, "text": 1.0})]


def staged(**options):
    prose = {"prose": Index([[(int(n), 0)] for n in np.random.default_rng(1).integers(20, 200, size=30)])}
    return Plan(corpus() | prose, SHAPE, 0, {"pair": 3.0, "mixed": 1.0, "prose": 0}, stages=STAGES, **options)


@pytest.mark.parametrize("balance", [True, False])
def test_stages_change_the_shares_from_their_first_micro_batch_on(balance):
    images, text, states = [Counter() for _ in range(3)], [Counter() for _ in range(3)], []
    for batch, state in staged(balance=balance).run():
        stage = (batch.number >= 100) + (batch.number >= 160)
        assert not balance or (batch.exact and batch.images == 5)
        for piece in (piece for row in batch.rows for piece in row):
            images[stage][piece.source] += piece.images
            text[stage][piece.source] += 0 if piece.images else piece.tokens
        states.append(state)
        if batch.number == 399:
            break
    assert images[0]["pair"] / images[0]["mixed"] == pytest.approx(3, rel=0.1)
    assert images[1]["mixed"] / images[1]["pair"] == pytest.approx(3, rel=0.1)
    assert text[0]["prose"] == 0 < text[0]["text"]
    assert text[1]["text"] < 200 and images[2]["mixed"] <= 5  # what the stage before had begun
    assert text[2]["prose"] / text[2]["text"] == pytest.approx(2, rel=0.15)
    # no pass is begun anew, and shares are told stage by stage
    assert [states[n]["pass"]["pair"] for n in (99, 159, 399)] == sorted(
        states[n]["pass"]["pair"] for n in (99, 159, 399)
    )
    shares = staged(balance=balance).shares(states[-1])
    tokens = [states[99]["tokens"], states[159]["tokens"], states[399]["tokens"]]
    for number, share in enumerate(shares):
        before = tokens[number - 1] if number else dict.fromkeys(tokens[0], 0)
        own = {name: tokens[number][name] - before[name] for name in before}
        assert share == pytest.approx({name: n / sum(own.values()) for name, n in own.items()})
    assert [len(staged().shares(states[n])) for n in (0, 99, 100, 160)] == [1, 1, 2, 3]


@pytest.mark.parametrize("balance", [True, False])
def test_staged_plans_resume_anywhere_also_where_a_stage_begins(balance):
    straight = [pair for pair, _ in zip(staged(balance=balance).run(), range(200), strict=False)]
    for number in (1, 99, 100, 101, 159, 160, 161):
        state = json.loads(json.dumps(straight[number - 1][1]))
        assert state["number"] == number
        resumed = staged(balance=balance).run(state)
        assert [next(resumed) for _ in range(30)] == straight[number : number + 30]
    walked = staged(balance=balance)
    assert walked.micro_batch(199) == straight[199][0] and walked.micro_batch(100) == straight[100][0]


def test_stages_and_balance_are_part_of_the_identity():
    sources, mixture = corpus(), {"mixed": 1.0, "pair": 1.0}
    plans = [
        Plan(sources, SHAPE, 0, mixture),
        Plan(sources, SHAPE, 0, mixture, stages=[(10, {"pair": 2.0, "mixed": 1.0})]),
        Plan(sources, SHAPE, 0, mixture, stages=[(11, {"pair": 2.0, "mixed": 1.0})]),
        Plan(sources, SHAPE, 0, mixture, stages=[(10, {"pair": 3.0, "mixed": 1.0})]),
        Plan(sources, SHAPE, 0, mixture, balance=False),
    ]
    assert len({plan.identity("corpus", "vocab") for plan in plans}) == 5
    assert collect(plans[0], 10) == collect(plans[1], 10)  # until it begins, a stage changes nothing
    assert collect(plans[0], 40) != collect(plans[1], 40)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([(9, {"pair": 0, "mixed": 0})], r"data.stages\[0\]: got images=5 per micro-batch, need a source with images"),
        ([(9, {}), (12, {"text": 0})], r"data.stages\[1\]: got a mixture without a text-only source"),
        ([(9, {"pears": 1})], r"data.stages\[0\]: got mixture weights for \['pears'\]"),
        ([(0, {})], r"got data.stages\[0\] at micro-batch 0 after 0, need stages that rise"),
        ([(9, {}), (9, {"pair": 2})], r"got data.stages\[1\] at micro-batch 9 after 9, need stages that rise"),
    ],
)  # fmt: skip
def test_impossible_stages_are_refused(stages, text):
    with pytest.raises(ValueError, match=text):
        Plan(corpus(), SHAPE, seed=0, stages=stages)


def test_without_balance_images_vary_around_q():
    plan = Plan(corpus(), SHAPE, seed=0, balance=False)
    batches = collect(plan, 2000)
    assert all(batch.exact and [sum(p.tokens for p in row) for row in batch.rows] == [64] * 4 for batch in batches)
    counts = np.array([batch.images for batch in batches])
    assert counts.mean() == pytest.approx(5, rel=0.03)
    assert counts.min() <= 2 and counts.max() >= 8
    images = Counter()
    for batch in collect(Plan(corpus(), SHAPE, 0, {"pair": 3.0, "mixed": 1.0}, balance=False), 400):
        for piece in (piece for row in batch.rows for piece in row):
            images[piece.source] += piece.images
    assert images["pair"] / images["mixed"] == pytest.approx(3.0, rel=0.03)  # weights mean what they mean with balance


def test_without_balance_each_token_comes_once_per_pass_and_images_stay_whole():
    sources, seen = corpus(), Counter()
    batches = [batch for batch, _ in Plan(sources, SHAPE, seed=0, passes=1, balance=False).run()]
    for piece in (piece for batch in batches for row in batch.rows for piece in row):
        seen.update((piece.source, piece.doc, t) for t in range(piece.start, piece.stop))
        offsets, images = sources[piece.source].segments(piece.doc)
        inside = [
            (piece.start <= a and b <= piece.stop, n) for a, b, n in zip(offsets, offsets[1:], images, strict=False)
        ]
        assert sum(n for whole, n in inside if whole) == piece.images
        cut = [n for (a, b, n) in zip(offsets, offsets[1:], images, strict=False) if a < piece.stop and piece.start < b]
        assert sum(cut) == piece.images
        assert piece.last == (piece.stop == sources[piece.source].document_tokens[piece.doc])
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == sum(int(s.document_tokens.sum()) for s in sources.values())
    endless, passes = Counter(), {}
    for batch, state in Plan(sources, SHAPE, seed=0, balance=False).run():
        endless.update((p.source, p.doc, t) for row in batch.rows for p in row for t in range(p.start, p.stop))
        passes = state["pass"]
        if min(passes.values()) >= 3:
            break
    for name, source in sources.items():
        counts = [endless[(name, d, t)] for d in range(source.n_documents) for t in range(source.document_tokens[d])]
        assert passes[name] - 1 <= min(counts) and max(counts) <= passes[name] + 1


def test_without_balance_text_must_fill_the_gaps(monkeypatch):
    monkeypatch.setattr("moma.data.plan.MAX_WAITING", 50)
    tight = {"pair": Index([[(22, 1)], [(50, 1)]] * 9), "text": Index([[(9, 0)]] * 9)}
    with pytest.raises(
        ValueError, match=r"got images=6 per micro-batch .* need room for text between them: lower data"
    ):
        collect(Plan(tight, PlanShape(4, 64, 6), seed=0, balance=False), 30_000)


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
