"""What each clever part of `ops/` gains: the same work with it and without it, in turns.

    python -m tests.bench.tricks [token memory native eager]

`hf_switch_sae/ops/README.md` and the parts' own headers quote these figures. A part that gains
nothing here has no reason to be there. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_switch_sae import SwitchSAEAdam
from hf_switch_sae.ops import deviations, eager
from hf_switch_sae.ops.native import kernels as native

from .cpu import machine, markdown
from .timing import TOKENS, D, F, K, Table, medians, ms, seconds, switch_sae

HEAD = ("part", "with it, ms", "without, ms", "gain")


def row(name: str, with_it: float, without: float) -> tuple[str, ...]:
    return name, ms(with_it), ms(without), f"{without / with_it:.2f}x"


def compared(
    name: str, with_it: Callable[[], Any], without: Callable[[], Any], repeats: int = 1
) -> tuple[str, ...]:
    calls = {"with": with_it, "without": without}
    taken = medians(calls, 15, dict.fromkeys(calls, repeats))
    return row(name, taken["with"], taken["without"])


# ---------------------------------------------------------------- one token

_CALLS = 20  # in a row: few, so that a neighbor who interrupts spoils only some of the rounds


@torch.no_grad()
def token_table() -> Table:
    """Encode and decode of a single token, by `native/token.py` or as any batch."""
    rows: Table = [HEAD]
    for num_features, num_experts, dtype in (
        (F, 64, torch.float32),
        (F, 64, torch.bfloat16),
        (262_144, 128, torch.float32),
    ):
        sae = switch_sae(num_experts, num_features).to(dtype)
        pool = torch.randn(64, 1, D)
        turn = itertools.cycle(range(len(pool)))

        def once(sae: Any = sae, pool: Tensor = pool, turn: Iterator[int] = turn) -> Tensor:
            return sae.decode(sae.encode(pool[next(turn)]))

        def as_a_batch(once: Callable[[], Tensor] = once) -> None:
            with mock.patch("hf_switch_sae.sae.model.plan_of", return_value=None):
                for _ in range(_CALLS):
                    once()

        def by_a_plan(once: Callable[[], Tensor] = once) -> None:
            for _ in range(_CALLS):
                once()

        name = f"single token, {num_features} features, {num_experts} experts, {dtype}"
        taken = medians({"with": by_a_plan, "without": as_a_batch}, 101)
        with_it, without = (taken[each] / _CALLS for each in ("with", "without"))
        rows.append(row(name.replace("torch.", ""), with_it, without))
    return rows


# ---------------------------------------------------------------- memory of gradients

_OFF: dict[str, Any] = {
    "kept gradients": ("hf_switch_sae.ops.routed.gradient_of", lambda weight: None),
    "kept blocks": ("hf_switch_sae.ops.memory._keep_freed_blocks", lambda: None),
}
"""Part of `memory.py` -> what to replace to switch it off."""


def training_step(without: str | None) -> Callable[[], None]:
    """A training step, with a part of `memory.py` switched off while it runs."""
    sae, x = switch_sae(32).train(), torch.randn(TOKENS, D)
    optimizer = SwitchSAEAdam(sae, lr=1e-4)

    def step() -> None:
        with mock.patch(*_OFF[without]) if without else nullcontext():
            sae(x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds_of_a_step(without: str | None, steps: int = 15) -> float:
    step = training_step(without)
    return statistics.median([seconds(step) for _ in range(steps + 3)][3:])


def memory_table(rounds: int = 9) -> Table:
    """Steps in turns; the C library never forgets what it has learned, so there whole processes."""
    rows: Table = [HEAD]
    part = "kept gradients"
    rows.append(compared(f"training step, {part}", training_step(None), training_step(part)))
    found: dict[str | None, list[float]] = {None: [], "kept blocks": []}
    for _ in range(rounds):
        for part, taken in found.items():
            code = f"from tests.bench.tricks import seconds_of_a_step as s; print(s({part!r}))"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            taken.append(float(done.stdout))
    # of a machine that others use too, the fastest process is disturbed least
    with_it, without = (min(taken) for taken in found.values())
    return [*rows, row("training step, kept blocks", with_it, without)]


# ---------------------------------------------------------------- kernels in C++


def batch(n: int, num_experts: int = 32) -> dict[str, tuple[Any, ...]]:
    """Arguments of the primitives for n tokens, evenly routed, in the order of experts."""
    torch.manual_seed(0)
    m = F // num_experts
    x, W = torch.randn(n, D), torch.randn(num_experts, m, D)
    experts = torch.arange(n) * num_experts // n
    offsets = torch.searchsorted(experts, torch.arange(num_experts + 1))
    local = torch.rand(n, m).topk(K, dim=1).indices
    ids, coefs = local + experts[:, None] * m, torch.rand(n, K)
    rows = W.view(-1, D)
    return {
        "expert_products": (x, None, W, None, offsets),
        "relu_topk": (torch.randn(n, m), K),
        "gather_sum": (coefs, ids, rows),
        "row_dots": (x, ids, rows),
        "scatter_sum": (coefs, ids, x, F),
    }


@torch.no_grad()
def native_table() -> Table:
    """Kernels in C++ against the same by torch's operators (`eager.py`)."""
    rows: Table = [HEAD]
    for n in (32, 512, TOKENS):
        for name, given in batch(n).items():
            ours, theirs = getattr(native, name), getattr(eager, name)
            rows.append(
                compared(
                    f"native {name}, {n} tokens",
                    lambda call=ours, given=given: call(*given),
                    lambda call=theirs, given=given: call(*given),
                    1 if n > 512 else 5,
                )
            )
    return rows


# ---------------------------------------------------------------- forms of torch's operators


@torch.no_grad()
def eager_table() -> Table:
    """What `eager.py` and `deviations.py` do otherwise than the operator one would think of."""
    rows: Table = [HEAD]
    experts = torch.randn(32, F // 32, D)
    turn = itertools.cycle(experts)  # so that a weight comes from memory, as another expert's does
    for c in (1, 8, 32):
        z, out = torch.randn(c, D), torch.empty(c, F // 32)
        rows.append(
            compared(
                f"products, {c} rows",
                lambda z=z, out=out: eager.products(z, next(turn), out),
                lambda z=z, out=out: torch.mm(z, next(turn).T, out=out),
                32,
            )
        )
    given = batch(TOKENS)
    pre = torch.randn(TOKENS, 1536)
    rows.append(
        compared(
            "relu_topk in two stages",
            lambda: eager.relu_topk(pre, K),
            lambda: eager._without_nan(pre, K, *pre.topk(K, dim=1, sorted=False)),
        )
    )
    coefs, ids, W = batch(32)["gather_sum"]
    rows.append(
        compared(
            "gather_sum of one token",
            lambda: eager.gather_sum(coefs[:1], ids[:1], W),
            lambda: torch.nn.functional.embedding_bag(
                ids[:1], W, per_sample_weights=coefs[:1], mode="sum"
            ),
            100,
        )
    )

    def dots_by_gather() -> None:
        with mock.patch.object(eager, "_SAMPLED", ()):
            eager.row_dots(*given["row_dots"])

    out = torch.empty(F, D)  # where the gradient lies, as in training

    def sums_at_once() -> None:
        with mock.patch.object(eager, "_BLOCK_BYTES", 2**40):
            eager.scatter_sum(*given["scatter_sum"], out)

    rows.append(
        compared("row_dots as a sampled product", lambda: eager.row_dots(*given["row_dots"]),
                 dots_by_gather)
    )  # fmt: skip
    rows.append(
        compared("scatter_sum in blocks", lambda: eager.scatter_sum(*given["scatter_sum"], out),
                 sums_at_once)
    )  # fmt: skip
    x, x_hat = torch.randn(2 * TOKENS, D), torch.randn(2 * TOKENS, D)
    mean = x.mean(0)

    def squares_at_once() -> None:
        with mock.patch.object(deviations, "_blocks", lambda x: [slice(0, len(x))]):
            deviations.squared_sums(x, x_hat, mean, None)

    rows.append(
        compared("squared_sums in blocks", lambda: deviations.squared_sums(x, x_hat, mean, None),
                 squares_at_once)
    )  # fmt: skip
    return rows


TABLES = {
    "token": token_table,
    "memory": memory_table,
    "native": native_table,
    "eager": eager_table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name in options.tables or TABLES:
        print(f"## {name}\n\n{markdown(TABLES[name]())}\n{machine()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
