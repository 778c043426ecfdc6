"""What calibration adds up, layer by layer: one function a statistic, (what was observed) -> what a batch adds.

Traits of an entry:
    of: What it is a function of. "slots": `ObservedTokens` -> any shape. "expert": `ExpertTokens` -> the row of this
        expert, so the statistic is (N, ...); the experts are run once more on the tokens that were routed to them.
        "choices": `ChosenOutputs` -> any shape; the same runs, with the experts of one token beside each other.
        "every_expert": `EveryExpert` -> any shape; a bounded sample of tokens goes through all experts.
        "experts": (`RunningExperts`, `ObservedTokens`) -> any shape, for what takes all experts of a token together;
        it runs them by itself.
    logits: True for one that reads the router's logits, which are recorded only then.
    residual: True for one that reads `ObservedTokens.residual`.
    gradients: True for one that reads `output_gradients`: calibration then runs backward too.
    precision: "float32" for sums that are as large as the experts; float64 otherwise.
    combine: How batches come together, "sum" (the default) or "max".
"""

from ..registry import Registry, import_submodules

STATISTICS = Registry("statistic")

import_submodules(__name__, __path__)
