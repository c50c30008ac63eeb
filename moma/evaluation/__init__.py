"""Evaluators: `(model, batches, vocab, mode) -> metrics`; the list is `EVALUATORS`.

`moma evaluate` runs every one of them in every mode of the model and writes the results to eval.json under its name;
`perplexity` also runs inside training. Every number belongs to a routing mode.
"""

from moma.evaluation.maps import routing_maps
from moma.evaluation.perplexity import perplexity
from moma.evaluation.routing import routing

EVALUATORS = {"perplexity": perplexity, "routing": routing, "maps": routing_maps}

__all__ = ["EVALUATORS", "perplexity"]
