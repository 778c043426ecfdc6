"""(tensor of a router (N, ...), groups, usage) -> (M, ...): what a router of N slots becomes with M. One file each.

A router is cut when a mapped result is exported to the native layout. A treatment is called for every tensor that
has one entry per slot: the rows of the scoring matrix (N, D), its bias (N,), a correction bias, a scale per expert.
Its signature is

    (name: str, tensor: Tensor, groups: ExpertGroups, usage_frequency: Tensor) -> Tensor

with `name` the tensor's name in the router ("weight", "bias", ...), `tensor` in the dtype of the checkpoint,
`usage_frequency` (N,) float64 from the calibration, and (M, ...) in the same dtype as the result, group g at place g.
Keyword-only parameters are options. A treatment computes in float32 and rounds once. Its first docstring line says
in the words of a model card what it keeps.
"""

from ...registry import Registry, import_submodules

TREATMENTS = Registry("router treatment")

import_submodules(__name__, __path__)
