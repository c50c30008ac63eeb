"""The plan: which tokens of which documents stand in micro-batch n. A pure function; reads lengths, never tokens.

    documents of image-bearing sources --(weights)--> atomic pieces --> exactly Q images, never cut
    documents of text-only sources ------------------> filler -------> the rest of every row, to the last token

Keystone: **exactly Q images in every micro-batch** of R rows x L tokens and no padding. Hence constant numbers of
text and image tokens, constant expert capacities (`moma/model/feed_forward.py`), one compiled graph, equal work on
every device. Data pipeline and router are one design.

- A micro-batch is a numbered object, independent of rank and world size: routing runs over it, so its shape is part
  of the model.
- An image, and a picture with its own caption, is never cut or separated. Documents longer than a row are cut at
  segment boundaries first; text fills gaps and is cut where a row ends, its continuation coming next. The last
  token of a cut piece keeps its target, so each token is an input once and a target once per pass.
- An epoch is a pass over one source. Passes follow each other in fresh pseudo-random orders; what does not fit yet
  is carried over, nothing is dropped.
- The mixture may change at a micro-batch (a *stage*): from there on other weights hold. Passes go on where they were,
  and what an earlier stage has begun is placed to its end.
- The plan depends on (corpus index, tokenizer, data seed, mixture, stages, rows, row length, Q, plan version) alone.
  Its state between two micro-batches is a small plain dict; "which documents did step N see?" has an answer.

With `passes` = 1 (evaluation) the stream ends: the last micro-batches may hold fewer images and padding at the end
(`exact` is False), and the model runs its padded form.

`balance=False` is the baseline that the keystone is measured against: Q images on average alone. Documents come in a
shuffled order, one with images with probability p, and fill row after row; images are whole as ever, the gap before
one that does not fit is filled with text. The sizes of the index sets change from micro-batch to micro-batch.

    p = Q d_I / (Q d_I + (R L - Q t_I) d_T)      d_I documents and t_I tokens per image, d_T documents per text token
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

PLAN_VERSION = 1
STATE_INTERVAL = 256  # micro-batches between remembered states: bounds the cost of looking back
MAX_WAITING = 4096  # pieces that may wait for a micro-batch they fit in, before Q is called impossible


class DocumentIndex(Protocol):
    """What the plan needs to know of a source: lengths only."""

    @property
    def n_documents(self) -> int: ...
    @property
    def document_tokens(self) -> np.ndarray: ...
    @property
    def document_images(self) -> np.ndarray: ...
    def segments(self, doc: int) -> tuple[np.ndarray, np.ndarray]: ...


class Piece(NamedTuple):
    """Tokens [start, stop) of a document; `images` of them are whole images; `last` at the document's end."""

    source: str
    doc: int
    start: int
    stop: int
    images: int
    last: bool

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `number`: for every row its pieces in order. `exact`: no padding and, if balanced, Q images."""

    number: int
    rows: tuple[tuple[Piece, ...], ...]
    exact: bool

    @property
    def images(self) -> int:
        return sum(piece.images for row in self.rows for piece in row)


@dataclass(frozen=True)
class PlanShape:
    """Rows x row length and Q: identity fields of the model (routing runs over the micro-batch)."""

    rows: int
    row_length: int
    images: int

    def __post_init__(self) -> None:
        if min(self.rows, self.row_length) < 1 or self.images < 0:
            raise ValueError(f"got rows={self.rows}, row_length={self.row_length}, images={self.images}: need "
                             "rows and row_length of at least 1 and images of at least 0")  # fmt: skip


class _Stage(NamedTuple):
    """The mixture from micro-batch `start` on: weights of images per image source and of tokens per text source."""

    start: int
    weights: dict[str, float]  # both kinds sum to 1
    images: list[str]  # sources with images
    texts: list[str]
    smallest: int  # tokens of the shortest segment with an image
    chance: float  # that a document has images, where the plan is not balanced


class Plan:
    """The numbered micro-batches of one corpus split; see the module docstring.

    `mixture` maps source names to weights: of images among image-bearing sources, of tokens among text-only ones.
    A source it does not name weighs as much as its size, 0 leaves it out. `stages`: other mixtures, each with the
    number of its first micro-batch. Raises ValueError where Q cannot be had.
    """

    def __init__(
        self,
        sources: Mapping[str, DocumentIndex],
        shape: PlanShape,
        seed: int,
        mixture: Mapping[str, float] | None = None,
        passes: int | None = None,
        stages: Sequence[tuple[int, Mapping[str, float]]] = (),
        balance: bool = True,
    ) -> None:
        self.shape, self.seed, self.passes, self.balance = shape, seed, passes, balance
        self._stages = [self._stage(0, _chosen(sources, mixture or {}), mixture or {})]
        for number, (start, weights) in enumerate(stages):
            if start <= self._stages[-1].start or passes is not None:
                raise ValueError(
                    f"got data.stages[{number}] at micro-batch {start} after {self._stages[-1].start}, need stages "
                    "that rise, the first after micro-batch 0, in a stream without end: correct data.stages"
                )
            try:
                self._stages.append(self._stage(start, _chosen(sources, weights), weights))
            except ValueError as error:
                raise ValueError(f"data.stages[{number}]: {error}") from error
        used = {name for stage in self._stages for name in stage.weights}
        self.sources = {name: source for name, source in sorted(sources.items()) if name in used}
        self._starts = [stage.start for stage in self._stages]
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        self._numbers, self._states = [0], [self._first_state()]

    # ---- what a plan is -------------------------------------------------------------------------------------

    def identity(self, corpus: str, vocab_hash: str) -> str:
        """Hash of everything the plan depends on; two runs with the same identity see the same micro-batches."""
        first, *later = [(stage.start, sorted(stage.weights.items())) for stage in self._stages]
        facts: list[Any] = [
            PLAN_VERSION, corpus, vocab_hash, self.seed, first[1],
            self.shape.rows, self.shape.row_length, self.shape.images, self.passes,
        ]  # fmt: skip
        facts += [{"stages": later}] if later else []
        facts += [] if self.balance else [{"balance": False}]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _stage(self, start: int, sources: Mapping[str, DocumentIndex], mixture: Mapping[str, float]) -> _Stage:
        """One stage over the sources it uses; raises ValueError where they cannot give Q images a micro-batch."""
        images = sorted(n for n, s in sources.items() if s.document_images.any())
        texts = sorted(set(sources) - set(images))
        weights: dict[str, float] = {}
        for names, size in ((images, "document_images"), (texts, "document_tokens")):
            raw = {n: mixture.get(n, float(getattr(sources[n], size).sum())) for n in names}
            weights |= {n: w / sum(raw.values()) for n, w in raw.items()}
        q, rows, length = self.shape.images, self.shape.rows, self.shape.row_length
        if q and not images:
            raise ValueError(f"got images={q} per micro-batch, need a source with images: the mixture has none; "
                             "add one or set images=0")  # fmt: skip
        if not q and images:
            raise ValueError(f"got images=0, but {images} hold images: set images to at least 1 or "
                             "leave them out of the mixture")  # fmt: skip
        if not texts and self.passes is None:
            raise ValueError("got a mixture without a text-only source, need one to fill the rows exactly: add one")
        smallest = min((_smallest(sources[n]) for n in images), default=1)
        fits = (length // smallest) * rows
        if fits < q:
            raise ValueError(
                f"got images={q} per micro-batch, need at most {fits}: the shortest image segment has "
                f"{smallest} tokens and the micro-batch {rows} rows x {length}; "
                f"set data.images<={fits} or enlarge the rows"
            )
        mean = sum(weights[n] * _per_image(sources[n], sources[n].document_tokens.sum()) for n in images)
        if self.passes is None and q * mean > rows * length:
            raise ValueError(
                f"got images={q} per micro-batch, need at most {int(rows * length / mean)}: an image brings "
                f"{mean:.0f} tokens of its documents on average and the micro-batch has {rows * length}; "
                "lower data.images"
            )
        pictured = q * sum(weights[n] * _per_image(sources[n], sources[n].n_documents) for n in images)
        plain = sum(weights[n] * sources[n].n_documents / sources[n].document_tokens.sum() for n in texts)
        plain *= max(0.0, rows * length - q * mean)
        return _Stage(start, weights, images, texts, smallest, float(pictured / ((pictured + plain) or 1)))

    def shares(self, state: dict[str, Any]) -> list[dict[str, float]]:
        """Realised share of tokens of every source, in each stage that has begun, up to a state of the plan."""
        marks = [*state.get("begun", []), [state["tokens"][name] for name in self.sources]]
        tokens = np.diff(np.array(marks), axis=0, prepend=0)
        return [dict(zip(self.sources, (row / max(1, row.sum())).tolist(), strict=True)) for row in tokens]

    # ---- micro-batches ----------------------------------------------------------------------------------------

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number`, from the nearest remembered state; raises IndexError beyond a finite stream's end."""
        at = bisect.bisect_right(self._numbers, number) - 1
        for batch, _ in self.run(self._states[at]):
            if batch.number == number:
                return batch
        raise IndexError(f"the plan ends before micro-batch {number}")

    def run(self, state: dict[str, Any] | None = None) -> Iterator[tuple[MicroBatch, dict[str, Any]]]:
        """Micro-batches from `state` (default: the start) on, each with the state that follows it."""
        state = _copy(self._states[0] if state is None else state)
        while True:
            batch = self._next(state)
            if batch is None:
                return
            if batch.number + 1 > self._numbers[-1] and (batch.number + 1) % STATE_INTERVAL == 0:
                self._numbers.append(batch.number + 1)
                self._states.append(_copy(state))
            yield batch, _copy(state)

    def _first_state(self) -> dict[str, Any]:
        zero = {name: 0 for name in self.sources}
        counters = {name: dict(zero) for name in ("pass", "position", "served", "tokens")}
        begun = {"begun": []} if len(self._stages) > 1 else {}  # tokens of every source before each later stage
        return {"number": 0, **counters, "waiting": [], "filler": [], **begun}

    def _next(self, state: dict[str, Any]) -> MicroBatch | None:
        """Compose one micro-batch and move `state` behind it; None when a finite stream is used up."""
        stage = self._enter(state)
        rows: list[list[Piece]] = [[] for _ in range(self.shape.rows)]
        free = [self.shape.row_length] * self.shape.rows
        images = self.shape.images
        if self.balance:
            images = self._place_images(stage, state, rows, free)
            if self.passes is not None and not any(rows) and state["waiting"]:
                images = self._place_images(stage, state, rows, free, reserve=False)  # the end: nothing stays behind
            self._fill(stage, state, rows, free)
        else:
            self._pour(stage, state, rows, free)
        if not any(rows):
            return None
        for piece in (piece for row in rows for piece in row):
            state["tokens"][piece.source] += piece.tokens
        state["number"] += 1
        exact = images == self.shape.images and not any(free)
        return MicroBatch(state["number"] - 1, tuple(tuple(row) for row in rows), exact)

    def _enter(self, state: dict[str, Any]) -> _Stage:
        """The stage of the state's micro-batch; where it begins, every source starts level."""
        number = bisect.bisect_right(self._starts, state["number"]) - 1
        if number and state["number"] == self._starts[number]:
            state["served"] = dict.fromkeys(self.sources, 0)
            state["begun"].append([state["tokens"][name] for name in self.sources])
        return self._stages[number]

    def _place_images(
        self, stage: _Stage, state: dict[str, Any], rows: list[list[Piece]], free: list[int], reserve: bool = True
    ) -> int:
        """Put atomic pieces with exactly Q images into the rows, those that wait first; returns their images.

        `reserve`: leave room for the images still needed; without it a micro-batch may hold fewer than Q.
        """
        need, waiting, held = self.shape.images, state["waiting"], []
        while need:
            while not waiting and self._draw(stage, stage.images, state):
                pass
            if not waiting:
                break
            piece = waiting.pop(0)
            row = max(range(len(free)), key=lambda r: (free[r], -r))  # the emptiest: leaves text long runs
            tokens, further = piece[3] - piece[2], need - piece[4]
            room = self._leaves_room(stage.smallest, free, row, tokens, further)
            if not any(rows) and further >= 0 and self.passes is None and not room:
                raise ValueError(
                    f"got an image piece of {tokens} tokens (source {piece[0]}, document {piece[1]}), need one that "
                    f"leaves room for {further} further images: lengthen the rows or lower data.images"
                )
            fits = room if reserve else tokens <= free[row]
            if further >= 0 and fits:
                rows[row].append(Piece(*piece))
                free[row] -= tokens
                need -= piece[4]
            else:
                held.append(piece)
            if len(held) > MAX_WAITING:
                raise ValueError(
                    f"got images={self.shape.images} per micro-batch of {self.shape.rows} rows x "
                    f"{self.shape.row_length}, need a number the documents add up to: choose another Q or longer rows"
                )
        state["waiting"] = held + waiting
        return self.shape.images - need

    def _leaves_room(self, smallest: int, free: list[int], row: int, tokens: int, need: int) -> bool:
        """Whether a piece fits into `row` and the images still needed could follow it, were they all small."""
        if tokens > free[row]:
            return False
        spare = sum(f // smallest for f in free) - free[row] // smallest
        return spare + (free[row] - tokens) // smallest >= need

    def _fill(self, stage: _Stage, state: dict[str, Any], rows: list[list[Piece]], free: list[int]) -> None:
        """Fill every row with text to the last token, cutting where the row ends."""
        for row, pieces in enumerate(rows):
            while free[row]:
                if not state["filler"] and not self._draw(stage, stage.texts, state):
                    return
                free[row] -= _take_text(state["filler"], pieces, free[row])

    def _pour(self, stage: _Stage, state: dict[str, Any], rows: list[list[Piece]], free: list[int]) -> None:
        """Fill row after row with documents as they come, those with images whole: the plan that is not balanced."""
        waiting, filler = state["waiting"], state["filler"]
        for row, pieces in enumerate(rows):
            while free[row]:
                if waiting and waiting[0][3] - waiting[0][2] <= free[row]:
                    pieces.append(Piece(*waiting.pop(0)))
                    free[row] -= pieces[-1].tokens
                elif filler:
                    free[row] -= _take_text(filler, pieces, free[row])
                elif not self._draw_any(stage, state):
                    break
                if len(waiting) > MAX_WAITING:
                    raise ValueError(
                        f"got images={self.shape.images} per micro-batch of {self.shape.rows} rows x "
                        f"{self.shape.row_length}, need room for text between them: lower data.images or lengthen the "
                        "rows"
                    )

    # ---- drawing documents ------------------------------------------------------------------------------------

    def _draw_any(self, stage: _Stage, state: dict[str, Any]) -> bool:
        """`_draw` of the sources with images or of the others, by chance; False where both are used up."""
        drawn = sum(state["pass"][n] * s.n_documents + state["position"][n] for n, s in self.sources.items())
        pictured = uniform(f"{self.seed}/kind/{drawn}") < stage.chance
        kinds = (stage.images, stage.texts) if pictured else (stage.texts, stage.images)
        return any(self._draw(stage, names, state) for names in kinds)

    def _draw(self, stage: _Stage, names: Sequence[str], state: dict[str, Any]) -> bool:
        """Draw the document that is due among `names`: its pieces with images to `waiting`, text to `filler`.

        False where they are used up.
        """
        source = self._due(stage, names, state)
        if source is None:
            return False
        doc = self._advance(source, state)
        index = self.sources[source]
        tokens, images = int(index.document_tokens[doc]), int(index.document_images[doc])
        if source in stage.texts:
            state["served"][source] += tokens
            state["filler"].append([source, doc, 0, tokens, True])
            return True
        state["served"][source] += images
        for piece in self._pieces(source, doc):
            if piece[4]:
                state["waiting"].append(piece)
            else:
                state["filler"].append([*piece[:4], piece[5]])
        return True

    def _due(self, stage: _Stage, names: Sequence[str], state: dict[str, Any]) -> str | None:
        """The source that is furthest behind its weight (ties: alphabetical), among those not used up."""
        live = [n for n in names if self.passes is None or state["pass"][n] < self.passes]
        return min(live, key=lambda n: ((state["served"][n] + 1) / stage.weights[n], n), default=None)

    def _advance(self, source: str, state: dict[str, Any]) -> int:
        pass_number, position = state["pass"][source], state["position"][source]
        doc = int(self._order(source, pass_number)[position])
        state["position"][source] += 1
        if state["position"][source] == self.sources[source].n_documents:
            state["pass"][source], state["position"][source] = pass_number + 1, 0
        return doc

    def _order(self, source: str, pass_number: int) -> np.ndarray:
        """Pseudo-random order of a source's documents in one pass; only the two latest passes are kept."""
        key = (source, pass_number)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source or k[1] == pass_number - 1}
            self._orders[key] = pass_order(self.sources[source].n_documents, f"{self.seed}/{source}/{pass_number}")
        return self._orders[key]

    def _pieces(self, source: str, doc: int) -> list[list[Any]]:
        """A document as pieces of at most one row: whole if it fits, else cut at segment boundaries first."""
        length, index = self.shape.row_length, self.sources[source]
        tokens, images = int(index.document_tokens[doc]), int(index.document_images[doc])
        if tokens <= length and images <= max(self.shape.images, 1):
            return [[source, doc, 0, tokens, images, True]]
        offsets, counts = index.segments(doc)
        pieces: list[list[Any]] = []
        for start, stop, count in zip(offsets[:-1].tolist(), offsets[1:].tolist(), counts.tolist(), strict=True):
            if count and stop - start > length:
                raise ValueError(
                    f"got an image segment of {stop - start} tokens (source {source}, document {doc}), need at most "
                    f"data.row_length={length}: lengthen the rows"
                )
            if count > max(self.shape.images, 1):
                raise ValueError(
                    f"got a segment with {count} images (source {source}, document {doc}), need at most "
                    f"data.images={self.shape.images}: raise data.images"
                )
            joins = pieces and stop - pieces[-1][2] <= length and pieces[-1][4] + count <= max(self.shape.images, 1)
            if joins:
                pieces[-1][3], pieces[-1][4] = stop, pieces[-1][4] + count
                continue
            for cut in range(start, stop, length) if not count else [start]:
                pieces.append([source, doc, cut, min(stop, cut + length), count, False])
        pieces[-1][5] = True
        return pieces


def documents_of(micro_batch: MicroBatch) -> list[list[Any]]:
    """What a micro-batch holds, ready for JSON: [source, document, first token, end] of every piece, row after row."""
    return [[p.source, p.doc, p.start, p.stop] for row in micro_batch.rows for p in row]


def _take_text(filler: list[list[Any]], pieces: list[Piece], room: int) -> int:
    """Move text from the head of `filler` into a row with `room` tokens, cut where the row ends; returns its tokens."""
    source, doc, start, stop, last = filler[0]
    cut = min(stop, start + room)
    pieces.append(Piece(source, doc, start, cut, 0, last and cut == stop))
    if cut == stop:
        filler.pop(0)
    else:
        filler[0][2] = cut
    return cut - start


def _per_image(source: DocumentIndex, amount: float) -> float:
    """An amount of a source, its tokens or documents, per image of it; text around the pictures included."""
    return float(amount / source.document_images.sum())


def _smallest(source: DocumentIndex) -> int:
    """Tokens of the shortest segment with an image, in a source's shortest document that has one."""
    holders = np.flatnonzero(source.document_images)
    doc = holders[np.argmin(source.document_tokens[holders])]
    offsets, images = source.segments(int(doc))
    return int(np.diff(offsets)[images > 0].min())


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that shares nothing: counters by source, lists of pieces, numbers; a ninth of `copy.deepcopy`'s time."""
    return {
        name: dict(value) if isinstance(value, dict) else [list(v) for v in value] if isinstance(value, list) else value
        for name, value in state.items()
    }


def _chosen(sources: Mapping[str, DocumentIndex], mixture: Mapping[str, float]) -> dict[str, DocumentIndex]:
    unknown = sorted(set(mixture) - set(sources))
    if unknown:
        raise ValueError(f"got mixture weights for {unknown}, need names among {sorted(sources)}: correct data.mixture")
    negative = sorted(n for n, w in mixture.items() if w < 0)
    if negative:
        raise ValueError(f"got negative mixture weights for {negative}, need 0 (leave out) or more")
    return {n: s for n, s in sorted(sources.items()) if s.n_documents and (n not in mixture or mixture[n] > 0)}


def uniform(key: str) -> float:
    """A pseudo-random number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little") / 2**48


def pass_order(n: int, key: str) -> np.ndarray:
    """A pseudo-random order of n documents that depends on `key` alone (splitmix64 keys, sorted): int64 (n,)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable")
