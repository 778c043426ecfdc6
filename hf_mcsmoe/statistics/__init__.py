"""What calibration adds up, layer by layer: one function a statistic, (what was observed) -> what a batch adds.

Traits of an entry:
    of: What it is a function of. "slots": `ObservedTokens` -> any shape. "expert": `ExpertTokens` -> the row of this
        expert, so the statistic is (N, ...); the experts are run once more on the tokens that were routed to them.
        "choices": `ChosenOutputs` -> any shape; the same runs, with the experts of one token beside each other.
        "every_expert": `EveryExpert` -> any shape; a bounded sample of tokens goes through all experts.
    logits: True for one that reads the router's logits, which are recorded only then.
    combine: How batches come together, "sum" (the default) or "max".
"""

from ..registry import Registry, import_submodules

STATISTICS = Registry("statistic")

import_submodules(__name__, __path__)
