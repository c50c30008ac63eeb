"""Evaluators: `(model, batches, vocab, mode) -> metrics`, per modality by default; the list is `EVALUATORS`.

The same functions run inside training, in `moma evaluate` and in tests. Every number belongs to a routing mode.
"""

from moma.evaluation.perplexity import perplexity
from moma.evaluation.routing import routing

EVALUATORS = {"perplexity": perplexity, "routing": routing}

__all__ = ["EVALUATORS"]
