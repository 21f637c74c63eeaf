"""The numerical kernels, on plain tensors.

`reference` holds the definitions; `routed` the computation, over the primitives of a backend
(`native`, `eager`, `triton_kernels`, or the naive ones of `reference`) that `backends` chooses.
"""

from hf_switch_sae.ops.backends import BACKENDS, backend_for, explain_backends, use_backend
from hf_switch_sae.ops.memory import release_gradient_of
from hf_switch_sae.ops.routed import keep_largest, routed_encode, sparse_decode
from hf_switch_sae.ops.routing import route, sort_by_expert
from hf_switch_sae.ops.token import PLAIN, TokenPlan, token_plan

__all__ = [
    "BACKENDS",
    "PLAIN",
    "TokenPlan",
    "backend_for",
    "explain_backends",
    "keep_largest",
    "release_gradient_of",
    "route",
    "routed_encode",
    "sort_by_expert",
    "sparse_decode",
    "token_plan",
    "use_backend",
]
