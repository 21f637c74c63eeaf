"""What all benchmarks measure with: medians of calls that take turns, and SAEs to call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae import SwitchSAE, SwitchSAEConfig

D, F, K = 768, 24_576, 32  # width, features, active features of all tables but where others stand
TOKENS = 4096
Table = list[tuple[str, ...]]


def switch_sae(num_experts: int, num_features: int = F, d: int = D, **config: Any) -> SwitchSAE:
    torch.manual_seed(0)
    sae = SwitchSAE(
        SwitchSAEConfig(
            hidden_size=d, num_features=num_features, num_experts=num_experts, k=K, **config
        )
    )
    return sae.eval()


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int = 7, repeats: dict[str, int] | None = None
) -> dict[str, float]:
    """Seconds of each call; a round runs all of them in turn, and the first is not counted.

    What is repeated within a round runs once more before it is timed, as the call before it has
    taken the caches and the memory.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            times = (repeats or {}).get(name, 1)
            if times > 1:
                call()
            taken = seconds(call, times)
            if turn:
                found[name].append(taken)
    return {name: statistics.median(taken) for name, taken in found.items()}


def ms(value: float) -> str:
    return f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}"


def against(ours: float, theirs: float | None) -> str:
    return "-" if theirs is None else f"{theirs / ours:.3g}x"


def stream_of(out: Any) -> Tensor:
    """The residual stream in a block's output."""
    return out[0] if isinstance(out, tuple) else out
