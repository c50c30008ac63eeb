"""Every initialisation, as one table.

| parameter                                | distribution                                              |
| ---------------------------------------- | --------------------------------------------------------- |
| embedding.weight                         | normal, std EMBEDDING_STD, cut at 3 std                   |
| attention.wqkv, w13 of experts, aux w1   | normal, std fan_in^-1/2, cut at 3 std                     |
| attention.wo, w2 of experts              | the same, divided by sqrt(2 n_layers) in pre-norm order   |
| routers, aux w2, head.weight             | normal, std fan_in^-1/2, cut at 3 std                     |
| sub-layers' norm gains                   | 1 in pre-norm order, SWIN_GAIN in Swin order              |
| final norm and QK-norm gains, biases     | 1, 0                                                      |
| routing state (buffers)                  | 0                                                         |

Stacked weights (experts, the modalities of untied attention) are drawn one like the other, and differ. Routers are
those of the experts and of mixture-of-depths; shared experts are one expert of their joint width.

Each tensor has a generator of its own, derived from (seed, name): a dense model and its sparse, untied and
mixture-of-depths twins start from the same bits wherever a name and its shape coincide, so paired seeds differ in
nothing but what an option changes.

Neither paper states its initialisation. In Swin order the norm after a sub-layer sets its size, so the gain takes the
place of a depth-dependent scale: small, it lets every block start near the identity (Swin V2 starts its gains at 0).
Not much smaller than this: a SwiGLU's output shrinks with the square of its input, and would start below the norms'
eps.
"""

import torch
from torch import Tensor, nn

from moma.seeds import generator

EMBEDDING_STD = 0.1
SWIN_GAIN = 0.125


def init_weights(model: nn.Module, seed: int, depth_scale: float = 1.0, gain: float = 1.0) -> None:
    """Initialise every parameter of a `Transformer` in place; routing state starts at zero.

    `depth_scale` multiplies the sub-layers' last matrices, `gain` is that of the sub-layers' norms. Raises KeyError
    for a name the table does not cover.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _init(name, parameter, generator(f"{seed}/{name}"), depth_scale, gain)
        for buffer in model.buffers():  # routing state
            buffer.zero_()


def _init(name: str, parameter: Tensor, source: torch.Generator, depth_scale: float, gain: float) -> None:
    parts = name.split(".")
    leaf, owner = parts[-1], parts[-2]
    if leaf.endswith("bias"):
        parameter.zero_()
    elif owner.endswith("norm"):
        parameter.fill_(gain if owner in ("attention_norm", "feed_forward_norm") else 1.0)
    elif owner == "embedding":
        _normal(parameter, EMBEDDING_STD, source)
    elif leaf in ("wqkv", "wo"):  # untied attention: (modality, in, out)
        _normal(parameter, (depth_scale if leaf == "wo" else 1.0) * parameter.shape[-2] ** -0.5, source)
    elif owner in ("wqkv", "wo", "head"):  # nn.Linear stores (out, in)
        scale = depth_scale if owner == "wo" else 1.0
        _normal(parameter, scale * parameter.shape[1] ** -0.5, source)
    elif leaf in ("w13", "w2", "w1", "router", "depth_router"):  # ours are (..., in, out)
        scale = depth_scale if leaf == "w2" and ("experts" in parts or owner == "shared") else 1.0
        _normal(parameter, scale * parameter.shape[-2] ** -0.5, source)
    else:
        raise KeyError(f"no initialisation for parameter {name}")


def _normal(parameter: Tensor, std: float, source: torch.Generator) -> None:
    """Drawn on the CPU in fp32, so that every device and precision starts from the same numbers."""
    values = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=source)
    parameter.copy_(values)
