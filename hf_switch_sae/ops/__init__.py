"""The numerical kernels, on plain tensors; README.md in this folder says what is where, and why.

`reference` has the definitions. `routed` computes them from the primitives of a backend (`triton`,
`native`, `eager`, or `reference` itself), which `backends` chooses. `operators` shows the result to
autograd and `torch.compile`. `native.token` is the short way for a single token.
"""

from hf_switch_sae.ops.backends import BACKENDS, backend_for, explain_backends, use_backend
from hf_switch_sae.ops.deviations import column_sums, scaled_errors, squared_sums
from hf_switch_sae.ops.memory import release_gradient_of
from hf_switch_sae.ops.native.kernels import PLAIN
from hf_switch_sae.ops.native.token import TokenPlan, token_plan
from hf_switch_sae.ops.operators import has_tangent, routed_encode, sparse_decode
from hf_switch_sae.ops.routed import keep_largest
from hf_switch_sae.ops.routing import check_ids, route, sort_by_expert

__all__ = [
    "BACKENDS",
    "PLAIN",
    "TokenPlan",
    "backend_for",
    "check_ids",
    "column_sums",
    "explain_backends",
    "has_tangent",
    "keep_largest",
    "release_gradient_of",
    "route",
    "routed_encode",
    "scaled_errors",
    "sort_by_expert",
    "sparse_decode",
    "squared_sums",
    "token_plan",
    "use_backend",
]
