"""Evaluators: `(model, batches, vocab, mode) -> metrics`; the list is `EVALUATORS`.

`moma evaluate` runs every one of them in every mode of the model and writes the results to eval.json; `perplexity`
also runs inside training. Every number belongs to a routing mode.
"""

from moma.evaluation.perplexity import perplexity
from moma.evaluation.routing import routing

EVALUATORS = {"perplexity": perplexity, "routing": routing}

__all__ = ["EVALUATORS", "perplexity"]
