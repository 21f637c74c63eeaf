"""The dtype for sums: float32, or float64 if that is what the tensors have; and dtypes' names.

Statistics, biases and the router are never computed in less. A float64 model is float64 throughout,
so that its formulas can be checked to the last digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(wide_dtype(x))


def name_of(dtype: torch.dtype | None) -> str:
    """The name of a dtype, such as "float32"; "" if there is none."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")
