"""Interleaved generation: text until a picture begins, its codes, text again (Chameleon's two decoders).

              text ids, EOS                          image codes left                no codes left
          +---- text ----+  -- BOI, if room -->  +---- picture ----+  -------->  EOI, forced, then text
          end of document or `max_new_tokens` ends a row; rows of a batch may be in different states

In text, the allowed ids are EOS, the text range, and BOI where pictures are asked for and the whole picture
with its EOI still fits. In a picture only image codes are. The head's other rows are not even read: the
distribution is the model's own, restricted exactly.

Classifier-free guidance for pictures runs further rows beside the conditional one, through the same caches:

    full          the document so far
    image only    its BOS, BOI, codes and EOI                 (only if the two scales differ)
    none          BOS BOI codes of the picture at hand        (waits at BOS, restarted at every step of text)

    logits = none + guidance_image (image only - none) + guidance (full - image only)

Equal scales are the two-way form none + guidance (full - none); 1 is off. Refuses routing mode `train` for
models whose rule sees the future: here there is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moma.generation.kv_cache import Decoder, compute_dtype, for_decoding, laid_out, plain_kernels
from moma.generation.sampling import OWN, Sampling, guided, guided_three_way, row_uniforms, sample
from moma.modality import Vocabulary
from moma.model.feed_forward import CAUSAL_MODES, Mode
from moma.model.transformer import Transformer

Context = Callable[[Sequence[int], Vocabulary], list[int]]


class Generation(NamedTuple):
    """What one prompt was continued with.

    `log_probs` (nats, one per token): log-probability among the allowed ids, after guidance, before
    repetition penalty, temperature and cuts; 0 for a forced EOI. `finished`: the model ended the document
    (EOS is the last token).
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool


@dataclass
class _Row:
    """State of one prompt; `codes_left` is None in text, else the image codes still to come."""

    codes_left: int | None
    finished: bool = False
    tokens: list[int] = field(default_factory=list)

    def advance(self, token: int, vocab: Vocabulary) -> None:
        self.tokens.append(token)
        if token == vocab.boi:
            self.codes_left = vocab.tokens_per_image
        elif token == vocab.eoi:
            self.codes_left = None
        elif token == vocab.eos:
            self.finished = True
        elif self.codes_left is not None:
            self.codes_left -= 1


class _Feed(NamedTuple):
    """One token for one row of the decoder: the id, whether there is one, whether the row starts afresh."""

    token: int
    present: bool = True
    restart: bool = False


def causal_mode(model: Transformer, mode: Mode) -> Mode:
    """The mode to generate in: `mode`, or `aux` for a model whose rules are causal anyway.

    Raises ValueError for a mode that sees the future, or without the auxiliary routers that `aux` needs.
    """
    if not model.needs_future:
        return "aux"
    remedy = (
        "use mode=threshold, or train the run's causal routers with objective=aux_routers init_from=RUN and generate "
        "from that run"
    )
    if mode not in CAUSAL_MODES:
        raise ValueError(
            f"got mode={mode} for generation, need one of {', '.join(CAUSAL_MODES)} (the training rule sees the "
            f"future): {remedy}"
        )
    if mode not in model.causal_modes():
        raise ValueError(f"got a model without auxiliary routers, need them to generate in mode {mode}: {remedy}")
    return mode


def codes_left(prompt: Sequence[int], vocab: Vocabulary, number: int = 0) -> int | None:
    """Image codes that the picture open at the prompt's end still lacks; None if the prompt ends in text.

    Raises ValueError (naming the prompt by its `number`) where `prompt` is no beginning of a document.
    """

    def wrong(what: str, need: str) -> ValueError:
        return ValueError(f"got prompt {number} {what}, need {need}: encode it as the corpus does")

    if not prompt or prompt[0] != vocab.bos:
        raise wrong("without BOS in front", "the beginning of a document")
    left: int | None = None
    for place, token in enumerate(prompt[1:], start=1):
        image = vocab.image_start <= token < vocab.image_stop
        if left is None:
            if image or token in (vocab.bos, vocab.pad, vocab.eos, vocab.eoi) or not 0 <= token < vocab.size:
                raise wrong(f"with id {token} at {place}", "text or BOI there")
            left = vocab.tokens_per_image if token == vocab.boi else None
        elif left:
            if not image:
                raise wrong(f"with id {token} at {place}", f"{left} more image codes there")
            left -= 1
        elif token == vocab.eoi:
            left = None
        else:
            raise wrong(f"with id {token} at {place}", f"EOI after {vocab.tokens_per_image} image codes")
    return left


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    vocab: Vocabulary,
    *,
    mode: Mode,
    max_new_tokens: int,
    text: Sampling = OWN,
    picture: Sampling = OWN,
    guidance: float = 1.0,
    guidance_image: float | None = None,
    pictures: bool = True,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt (ids, from BOS on) by up to `max_new_tokens`, all in one batch.

    `pictures`: whether text may begin one. `guidance_image=None`: the same as `guidance`. `rows`: the number
    that seeds each prompt's draws with `seed` (default: its place), so that a batch may be cut anywhere. Runs
    under the caller's autocast. Raises ValueError for a mode that is not causal and for prompts that are no
    document's beginning or whose open picture does not fit.
    """
    mode = causal_mode(model, mode)
    states = [_Row(codes_left(prompt, vocab, number)) for number, prompt in enumerate(prompts)]
    open_codes = max((row.codes_left for row in states if row.codes_left is not None), default=-1)
    if max_new_tokens <= open_codes or max_new_tokens < 1:
        raise ValueError(
            f"got max_new_tokens={max_new_tokens}, need at least {max(1, open_codes + 1)}"
            f"{' for the open picture and its end' if open_codes >= 0 else ''}: raise max_new_tokens"
        )
    if not prompts:
        return []
    device = model.embedding.weight.device
    room = vocab.tokens_per_image + 2  # BOI, codes, EOI
    scales = guidance, guidance if guidance_image is None else guidance_image
    if open_codes < 0 and (not pictures or max_new_tokens < room):
        scales = 1.0, 1.0  # no picture can come: no row for its guidance
    streams = _streams(*scales)
    uniform_RN = row_uniforms(seed, range(len(prompts)) if rows is None else rows, max_new_tokens).to(device)
    model = for_decoding(model)
    heads = _Heads(model, vocab, prompts)

    histories = [[stream(prompt, vocab) for prompt in prompts] for stream in streams]
    flat = [history for stream in histories for history in stream]
    width = max(map(len, flat))
    decoder = Decoder(model, vocab, len(flat), width + max_new_tokens - 1, mode)
    padded = [[_Feed(vocab.pad, False)] * (width - len(h)) + [_Feed(t) for t in h] for h in flat]
    log_probs_NR = torch.zeros(max_new_tokens, len(prompts), dtype=torch.float64, device=device)
    for step in range(max_new_tokens):
        hidden_SRD = _feed(decoder, padded, device).unflatten(0, (len(streams), len(prompts)))
        live = [r for r, row in enumerate(states) if not row.finished]
        chosen = {r: vocab.eoi for r in live if states[r].codes_left == 0}
        begin = pictures and max_new_tokens - step >= room
        for in_picture, sampling in ((False, text), (True, picture)):
            here = [r for r in live if r not in chosen and (states[r].codes_left is not None) == in_picture]
            if not here:
                continue
            here_R = torch.tensor(here, device=device)
            if in_picture:
                logits_RV = _guided(heads.image(hidden_SRD[:, here_R]), streams, *scales)
                column_R = sample(logits_RV, uniform_RN[here_R, step], sampling)
                token_R = column_R + vocab.image_start
            else:
                logits_RV, seen_RV = heads.text(hidden_SRD[0, here_R], here_R, begin)
                column_R = sample(logits_RV, uniform_RN[here_R, step], sampling, seen_RV)
                token_R = heads.saw(here_R, column_R)
            picked_R = logits_RV.log_softmax(1).gather(1, column_R[:, None]).squeeze(1)
            log_probs_NR[step, here_R] = picked_R.double()
            chosen |= dict(zip(here, token_R.tolist(), strict=True))
        for r, token in chosen.items():
            states[r].advance(token, vocab)
        if all(row.finished for row in states):
            break
        padded = [
            [_Feed(vocab.pad, False) if row.finished else _next(stream, row, vocab)]
            for stream in streams
            for row in states
        ]
    log_probs = log_probs_NR.T.tolist()
    return [Generation(row.tokens, log_probs[r][: len(row.tokens)], row.finished) for r, row in enumerate(states)]


def full_context(prompt: Sequence[int], vocab: Vocabulary) -> list[int]:
    """What the conditional row sees: everything."""
    return list(prompt)


def image_context(prompt: Sequence[int], vocab: Vocabulary) -> list[int]:
    """What the image-only row sees: BOS, and every picture with its BOI and EOI."""
    structure = (vocab.bos, vocab.boi, vocab.eoi)
    return [t for t in prompt if t in structure or vocab.image_start <= t < vocab.image_stop]


def no_context(prompt: Sequence[int], vocab: Vocabulary) -> list[int]:
    """What the unconditional row sees: BOS, and the picture that is open at the end, if one is."""
    if codes_left(prompt, vocab) is None:
        return [vocab.bos]
    begin = max(place for place, token in enumerate(prompt) if token == vocab.boi)
    return [vocab.bos, *prompt[begin:]]


def _streams(text_scale: float, image_scale: float) -> list[Context]:
    """The contexts whose logits count, the full one first."""
    streams = [full_context]
    if text_scale != image_scale:
        streams.append(image_context)
    if image_scale != 1:
        streams.append(no_context)
    return streams


def _guided(logits_SRV: Tensor, streams: list[Context], text_scale: float, image_scale: float) -> Tensor:
    by_context = dict(zip(streams, logits_SRV, strict=True))
    full_RV = by_context[full_context]
    none_RV = by_context.get(no_context)
    image_RV = by_context.get(image_context)
    if image_RV is not None and none_RV is not None:
        return guided_three_way(none_RV, image_RV, full_RV, image_scale, text_scale)
    other_RV = none_RV if image_RV is None else image_RV
    return full_RV if other_RV is None else guided(other_RV, full_RV, text_scale)


def _next(stream: Context, row: _Row, vocab: Vocabulary) -> _Feed:
    """What a context's row is fed after the token that `row` has just got."""
    token = row.tokens[-1]
    if stream is no_context and row.codes_left is None:
        return _Feed(vocab.bos, restart=True)
    if stream is image_context and row.codes_left is None and token != vocab.eoi:
        return _Feed(vocab.pad, present=False)
    return _Feed(token)


def _feed(decoder: Decoder, feeds: list[list[_Feed]], device: torch.device) -> Tensor:
    columns = torch.tensor(feeds, device=device)  # (rows, tokens, 3)
    present_RL, restart_R = columns[:, :, 1].bool(), columns[:, 0, 2].bool()
    return decoder.feed(columns[:, :, 0], present_RL, restart_R)


class _Heads:
    """The head's rows that text and pictures read, in the compute type, and the text ids (never structure) that each
    row has seen."""

    def __init__(self, model: Transformer, vocab: Vocabulary, prompts: Sequence[Sequence[int]]) -> None:
        weight_VD = model.head.weight
        ranges = [(vocab.eos, vocab.eos + 1), (vocab.boi, vocab.boi + 1), (vocab.text_start, vocab.text_stop)]
        self.n_structure = 2
        self.text_ids_V = torch.cat([torch.arange(*part, device=weight_VD.device) for part in ranges])
        self.weight_VD, self.low, self.ranges = weight_VD, compute_dtype(model), ranges
        self.image_range = (vocab.image_start, vocab.image_stop)
        seen = torch.zeros(len(prompts), vocab.size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, [t for t in prompt if vocab.text_start <= t < vocab.text_stop]] = True
        self.seen_RV = seen.to(weight_VD.device)[:, self.text_ids_V]

    @cached_property
    def text_weight_VD(self) -> Tensor:
        """Read by text: copied when the first text is drawn."""
        return laid_out(torch.cat([self.weight_VD[start:stop].to(self.low) for start, stop in self.ranges]))

    @cached_property
    def image_weight_VD(self) -> Tensor:
        """Read by pictures: copied when the first code is drawn."""
        return laid_out(self.weight_VD[slice(*self.image_range)].to(self.low))

    def image(self, hidden_SRD: Tensor) -> Tensor:
        """Logits of the image codes, at least fp32."""
        return _logits(hidden_SRD, self.image_weight_VD)

    def text(self, hidden_RD: Tensor, rows_R: Tensor, begin: bool) -> tuple[Tensor, Tensor]:
        """Logits of `text_ids_V`, BOI masked unless a picture may `begin`, and the columns seen so far."""
        logits_RV = _logits(hidden_RD, self.text_weight_VD)
        if not begin:
            logits_RV[:, 1] = -torch.inf
        return logits_RV, self.seen_RV[rows_R]

    def saw(self, rows_R: Tensor, column_R: Tensor) -> Tensor:
        """Note the columns as seen; returns their ids."""
        self.seen_RV[rows_R, column_R] |= column_R >= self.n_structure
        return self.text_ids_V[column_R]


def _logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    with plain_kernels(hidden.shape[:-1].numel(), weight_VD, weight_VD.dtype):
        logits = F.linear(hidden, weight_VD)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
