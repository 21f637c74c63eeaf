"""A single token on a CPU: one call of a native kernel encodes it, and one decodes it.

How    While a model generates, an SAE sees one token at a time. Its products then take some 15
       microseconds, one of torch's operators 1 or 2, and a look at a tensor a tenth of that. So the
       number of operators and looks decides. What the kernels must know of an SAE is therefore laid
       out once, as a plan, and each token only checks that the plan is still valid. No weight is
       copied: the expert's rows are read where they lie.
Why    Encoding and decoding one token in the general way takes 4.7 times as long (24,576 features,
       64 experts, float32), 7.5 times in bfloat16, and 2.1 times with 262,144 features, where most
       of the time goes into reading weights (`python -m tests.bench.tricks token`, one thread).
Beware A plan holds addresses. `holds` must notice everything that can move or replace a weight.
"""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_switch_sae.errors import BackendError
from hf_switch_sae.ops.backends import takes
from hf_switch_sae.ops.native import kernels as native
from hf_switch_sae.ops.native.kernels import PLAIN

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)
_WORTH_A_THREAD = 2**17  # weights of an expert from which several threads are worth their start
_POINTERS = (
    *("scale", "outlier_norm", "router", "b_router"),
    *("b_dec", "W_enc", "b_enc", "W_dec"),
)
Weights = tuple[Any, ...]
"""An SAE's tensors in this order: input_scale [], outlier_norm [], router.weight [E, d], b_router
[d], all float32; b_dec [d], W_enc [E, m, d], b_enc [E, m] or None, W_dec [E, m, d]. With one expert
there is no router: its two are None."""
Rules = tuple[int, bool, bool]
"""k, subtract_b_dec, apply_router_probs."""


class _Layout(ctypes.Structure):
    """`Plan` of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("E", "m", "d", "k")),
        *((name, ctypes.c_int) for name in ("centered", "gated", "low")),
    ]


class TokenPlan:
    """Takes single tokens through an SAE, as long as it `holds`.

    logits = router @ (scale * x - b_router)    acts = the k largest of
    p * relu(W_enc[e] @ (x - b_dec / scale) + b_enc[e] / scale)
    y = sum_j acts[j] * W_dec[ids[j]] + b_dec / scale
    """

    def __init__(self, weights: Weights, rules: Rules) -> None:
        self._of = _seen(weights, rules)
        W_enc = weights[5]
        (E, m, d), k = W_enc.shape, rules[0]
        self.can = self._of[-1] and _are_as_described(weights, k)
        self._dtype, self._is_long = W_enc.dtype, m * d >= _WORTH_A_THREAD
        self._layout = _Layout(*self._of[0], E, m, d, *rules, W_enc.dtype == torch.bfloat16)
        # the kernels read it at this address, so it must live as long as the plan
        self._at = ctypes.addressof(self._layout)
        self._k, self.width, self.num_features = k, d, E * m
        self._like: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def holds(self, weights: Weights, rules: Rules) -> bool:
        """Whether every tensor is where it was, and the large ones have their shape and dtype."""
        return self._of == _seen(weights, rules)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] of one token -> acts [..., k] in the dtype of W_enc, ids [..., k] int64.

        A token whose norm exceeds outlier_norm has no activations.
        """
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        like_acts, like_ids, _ = self._results_of(x.ndim)
        acts, ids = torch.empty_like(like_acts), torch.empty_like(like_ids)
        threads = torch.get_num_threads() if self._is_long else 1
        native.encode_token(self._at, *_addresses(x, acts, ids), threads)
        return acts, ids

    def decode(self, acts: Tensor, ids: Tensor) -> Tensor:
        """acts, ids [..., slots] of one token -> y [..., d] in the dtype of W_dec.

        Raises:
            FeatureIdError: an id is no feature.
        """
        if acts.dtype != self._dtype or not acts.is_contiguous():
            acts = acts.to(self._dtype).contiguous()
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            ids = ids.to(torch.int64).contiguous()
        y = torch.empty_like(self._results_of(acts.ndim)[2])
        at_acts, at_ids, at_y = _addresses(acts, ids, y)
        slots = acts.numel()
        native.decode_token(self._at, at_acts, at_ids, slots, self.num_features, at_y)
        return y

    def _results_of(self, ndim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Templates of acts, ids and y with this many dimensions: empty_like is the fastest way."""
        if (like := self._like.get(ndim)) is None:
            ones = (1,) * (ndim - 1)
            like = self._like[ndim] = (
                torch.empty(*ones, self._k, dtype=self._dtype, device=_CPU),
                torch.empty(*ones, self._k, dtype=torch.int64, device=_CPU),
                torch.empty(*ones, self.width, dtype=self._dtype, device=_CPU),
            )
        return like


def _addresses(*tensors: Tensor) -> list[int]:
    """Where tensors lie; the kernels read and write there, so it must be a CPU's memory.

    Raises:
        BackendError: a tensor of another device, or one without memory of its own.
    """
    if strange := [t for t in tensors if type(t) not in PLAIN or not t.is_cpu]:
        raise BackendError(
            f"the native kernels work in a CPU's memory, and a {type(strange[0]).__name__} on "
            f"{strange[0].device} is not there: move it with .cpu(), or use_backend('eager')."
        )
    return [tensor.data_ptr() for tensor in tensors]


_plans: WeakKeyDictionary[nn.Module, TokenPlan] = WeakKeyDictionary()


def token_plan(owner: nn.Module, weights: Weights, rules: Rules) -> TokenPlan | None:
    """The plan for an SAE whose weights `owner` holds; None if the kernels can't read them."""
    plan = _plans.get(owner)
    if plan is None or not plan.holds(weights, rules):
        plan = _plans[owner] = TokenPlan(weights, rules)
    return plan if plan.can else None


def _seen(weights: Weights, rules: Rules) -> tuple[Any, ...]:
    """All that a plan depends on: a weight may be replaced, or get new memory, at any time."""
    W_enc, W_dec = weights[5], weights[7]
    places = [None if t is None else t.data_ptr() for t in weights]
    sizes = W_enc.dtype, W_enc.shape, W_enc.stride(), W_dec.shape, W_dec.stride()
    return places, rules, sizes, takes("native", _CPU, torch.float32)


def _are_as_described(weights: Weights, k: int) -> bool:
    """Whether all tensors lie row by row in a CPU's memory, as `Weights` describes them."""
    *numbers, b_dec, W_enc, b_enc, W_dec = weights
    (E, m, d), low = W_enc.shape, W_enc.dtype
    shapes = ((), (), (E, d), (d,)), ((d,), (E, m, d), (E, m), (E, m, d))
    wanted = [
        *zip(numbers, shapes[0], (torch.float32,) * 4, strict=True),
        *zip((b_dec, W_enc, b_enc, W_dec), shapes[1], (low,) * 4, strict=True),
    ]
    has_router = numbers[2] is not None and numbers[3] is not None
    return (
        low in _DTYPES
        and 1 <= k <= m
        and has_router == (E > 1)
        and all(
            type(t) in PLAIN
            and t.device.type == "cpu"
            and t.dtype == dtype
            and t.shape == shape
            and t.is_contiguous()
            for t, shape, dtype in wanted
            if t is not None
        )
    )
