"""Selection rules: which expert computes which token. One file per rule, pure functions; `SELECTIONS` is the list.

What a rule consists of stands in `rule.py`. Adding one = one file, one line here, one YAML.
"""

from moma.model.routing import expert_choice, threshold, token_choice
from moma.model.routing.rule import Choice, Disturbance, Group, RouterStats, Rule, State

SELECTIONS = {
    "expert_choice": expert_choice.RULE,
    "token_choice": token_choice.RULE,
    "threshold": threshold.RULE,
}

__all__ = ["SELECTIONS", "Choice", "Disturbance", "Group", "RouterStats", "Rule", "State"]
