"""Hugging Face's Chameleon with the weights of our dense decoder: the same function of the same tokens.

norms        in the order of ours (`swin_norm`: as in the 34B model where ours is `swin`, as in the 7B one for `pre`)
attention    its default (SDPA), one document per row
loss         its own, from `labels`; the mask that it lays on the logits of image codes can be left out
"""

from typing import Any

import torch
from torch import Tensor, nn

from moma.hf_chameleon import VQ_PREFIX, config_of, layout, take_apart
from moma.modality import Vocabulary
from moma.model.transformer import Transformer

IMAGE_CODES = "IMGIMG"  # how the library knows the codes in its vocabulary map


def chameleon(model: Transformer, vocab: Vocabulary, positions: int, masks_images: bool) -> nn.Module:
    """`ChameleonForConditionalGeneration` for rows of up to `positions` tokens, on the device and in the dtype of a
    dense `model`, with its weights and without a picture tokenizer to train.

    `masks_images`: set the logits of image codes to the smallest number, as it does with a real vocabulary. Its loss on
    image codes is useless then.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    described = config_of(model.config, vocab, positions)
    if not masks_images:
        names = described["vocabulary_map"].items()
        described["vocabulary_map"] = {name: i for name, i in names if not name.startswith(IMAGE_CODES)}
    weight = model.head.weight
    with torch.device(weight.device):
        peer: Any = ChameleonForConditionalGeneration(ChameleonConfig.from_dict(described))
    peer.to(weight.dtype)
    own, theirs = model.state_dict(), {}
    for name, parts in layout(model.config, vocab.size).items():
        theirs |= dict(zip(parts.names, take_apart(parts, own[name]), strict=True))
    missing, unexpected = peer.load_state_dict(theirs, strict=False)
    assert not unexpected and all(name.startswith(VQ_PREFIX) for name in missing), (missing, unexpected)
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_(not name.startswith(VQ_PREFIX))
    return peer


def labels_of(target_RL: Tensor) -> Tensor:
    """The library's labels, which it moves one place itself, for our targets (IGNORE is -100 in both)."""
    return torch.cat([torch.full_like(target_RL[:, :1], -100), target_RL[:, :-1]], dim=1)


def peer_continued(
    peer: Any, vocab: Vocabulary, prompt: list[int], new_tokens: int, cache: str | None = None, compiled: bool = False
) -> list[int]:
    """The most likely `new_tokens` by the library's own generation, which nothing ends early."""
    from transformers import CompileConfig, GenerationConfig

    on_any_device: Any = CompileConfig()
    on_any_device._compile_all_devices = True

    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=vocab.pad,
        cache_implementation=cache,
        disable_compile=not compiled,
        compile_config=on_any_device,
    )
    ids: Tensor = torch.tensor([prompt], device=peer.device)
    out = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, len(prompt) :].tolist()
