"""The numerical kernels, on plain tensors.

`reference` holds the definitions, `eager` the routed computation for any device. What is exported
here is what the model uses; `BACKENDS` names them all, for parity tests and benchmarks.
"""

from types import ModuleType

from hf_switch_sae.ops import eager, reference
from hf_switch_sae.ops.eager import keep_largest, route, routed_encode, sparse_decode

BACKENDS: dict[str, ModuleType] = {"eager": eager, "reference": reference}

__all__ = ["BACKENDS", "keep_largest", "route", "routed_encode", "sparse_decode"]
