"""What a router does with its tokens, per modality, and how far its experts have grown apart.

    none, one, several    share of the tokens that 0, 1, 2 or more of the router's experts compute
    load                  per expert, the share of the tokens that it computes
    load_entropy          entropy of the experts' shares of the choices, over its maximum (1: equal loads)
    dropped               share of the choices that a capacity refused (training rule only)
    token_information     of text: how far the token's id alone tells the choice, see `token_information`
    specialisation        1 right after upcycling, about 0 for unrelated experts, see `specialisation`

Tokens are those of the router's groups: behind a depth router those that it lets in. A depth router is one of one
expert. All but `specialisation` are over held-out tokens and belong to a routing mode.

Legend: T tokens, E columns of a router, P weights of one expert.
"""

from typing import Any

import torch
from torch import Tensor

from moma.distributed import whole
from moma.evaluation.decisions import Decisions
from moma.modality import TEXT, Vocabulary
from moma.model.feed_forward import SparseFeedForward
from moma.model.transformer import Transformer
from moma.objectives import load_entropy

MIN_COUNT = 20  # occurrences of a token id to count in `token_information`


@torch.no_grad()
def diagnostics(decisions: Decisions, vocab: Vocabulary) -> dict[str, dict[str, dict[str, Any]]]:
    """Per router and modality that it routes: the numbers of the module docstring, None where one is not defined."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for router, stats in decisions.routers.items():
        member_TE, selected_TE = decisions.joined(router, "member_TE"), decisions.joined(router, "selected_TE")
        found[router] = {}
        for m, modality in enumerate(vocab.modalities):
            of_T = member_TE.any(1) & (decisions.modality_T == m)
            if not of_T.any():
                continue
            chosen_TE, open_E = selected_TE[of_T], member_TE[of_T].any(0)
            picks_T = chosen_TE.sum(1)
            entropy, some = load_entropy(chosen_TE.sum(0), open_E)
            own = {
                "none": _share(picks_T == 0),
                "one": _share(picks_T == 1),
                "several": _share(picks_T > 1),
                "load": chosen_TE.double().mean(0).tolist(),
                "load_entropy": entropy.item() if some else None,
            }
            if decisions.mode == "train" and stats[0].dropped_TE is not None:  # causal modes are dropless
                refused = int(decisions.joined(router, "dropped_TE")[of_T].sum())
                own["dropped"] = refused / max(1, refused + int(chosen_TE.sum()))
            if m == TEXT:
                own |= token_information(decisions.id_T[of_T], chosen_TE[:, open_E])
            found[router][modality] = own
    return found


def token_information(id_T: Tensor, chosen_TE: Tensor) -> dict[str, float | None]:
    """Mean over experts of I(id; choice) / H(choice): 0 if a token's id says nothing about the choice, 1 if it decides.

    Over tokens whose id occurs at least MIN_COUNT times: with p(v) an id's share of these tokens, q_e(v) the share of
    its occurrences that expert e computes and q_e its mean, H(choice) = h(q_e), I = h(q_e) - sum_v p(v) h(q_e(v)),
    h(q) = -q log q - (1 - q) log(1 - q). Experts that compute all or none are left out. The estimate is biased
    upwards: `token_information_by_chance` is about what independent choices would give, (ids - 1) / (2 T h(q_e)).
    """
    empty: dict[str, float | None] = {"token_information": None, "token_information_by_chance": None}
    _, inverse_T, count_V = torch.unique(id_T, return_inverse=True, return_counts=True)
    often_T = (count_V >= MIN_COUNT)[inverse_T]
    _, inverse_T, count_V = torch.unique(id_T[often_T], return_inverse=True, return_counts=True)
    n_tokens, chosen_TE = int(often_T.sum()), chosen_TE[often_T].double()
    if not n_tokens:
        return empty
    taken_VE = torch.zeros(len(count_V), chosen_TE.shape[1], dtype=torch.float64).index_add(0, inverse_T, chosen_TE)
    whole_E = _entropy(chosen_TE.mean(0))
    rest_E = ((count_V / n_tokens)[:, None] * _entropy(taken_VE / count_V[:, None])).sum(0)
    free_E = whole_E > 0
    if not free_E.any():
        return empty
    return {
        "token_information": ((whole_E - rest_E) / whole_E)[free_E].mean().item(),
        "token_information_by_chance": ((len(count_V) - 1) / (2 * n_tokens * whole_E[free_E])).mean().item(),
    }


@torch.no_grad()
def specialisation(model: Transformer) -> dict[str, dict[str, float]]:
    """Per expert router and group: mean over pairs of its experts of the cosine similarity of their weights.

    The weights are w13 and w2, flattened together; there are no pairs across groups.
    """
    found: dict[str, dict[str, float]] = {}
    for name, router in model.routers().items():
        if not isinstance(router, SparseFeedForward):
            continue
        found[name] = {}
        for (group, size), experts in zip(router.groups.items(), router.experts, strict=True):
            if size > 1:
                gram_EE: Tensor | float = 0.0
                for weight in ("w13", "w2"):  # one at a time: no copy of the experts
                    flat_EP = whole(experts.get_parameter(weight)).flatten(1)
                    gram_EE = gram_EE + (flat_EP @ flat_EP.T)
                assert isinstance(gram_EE, Tensor)
                length_E = gram_EE.diagonal().sqrt()
                similarity_EE = gram_EE / (length_E[:, None] * length_E)
                found[name][group] = ((similarity_EE.sum() - similarity_EE.trace()) / (size * (size - 1))).item()
    return found


def _share(mask_T: Tensor) -> float:
    return mask_T.double().mean().item()


def _entropy(q: Tensor) -> Tensor:
    return -torch.special.xlogy(q, q) - torch.special.xlogy(1 - q, 1 - q)
