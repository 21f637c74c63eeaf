"""The Triton kernels on a real GPU: first that they are right, then how near its limits they run.

    python tests/bench/gpu.py [--check] [--write FILE] [--profile FILE]

Compared are all primitives with `ops.reference`, the model's loss and every gradient with the same
model in float64 on the CPU, and the optimizer's steps with those of torch's. Then medians of
interleaved rounds, each call after a flush of the cache, beside the time that its bytes or its FLOP
take at least, at the rates of a copy and of a product measured in the same run. One Markdown table;
exit 1 where something is wrong. Without a CUDA device only the comparisons run, small, in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig
from hf_switch_sae.ops import eager, reference
from hf_switch_sae.ops.triton import kernels as triton_kernels

BY_EXPERT = "scatter_sum by expert"
PRIMITIVES = ("expert_products", "relu_topk", "gather_sum", "row_dots", "scatter_sum", BY_EXPERT)
L2_RATE = 5.5e12  # bytes/s of an H100's; memory's and the GEMM's rate are measured
GEMM = 8192  # rows, columns and depth of the GEMM whose rate is the limit
COPIED = 2**31  # bytes
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Size:
    """n tokens of width d, E experts of m features, k slots a token."""

    n: int
    d: int
    E: int
    m: int
    k: int


SMALL = Size(n=29, d=37, E=3, m=24, k=5)
ODD = Size(n=517, d=100, E=7, m=130, k=9)
FULL = Size(n=8192, d=768, E=16, m=1536, k=32)
STEP_FLOOR = 0.6
"""ms for a training step of FULL in bfloat16 on an H100: GEMMs, activations, Adam's bytes."""


def arguments(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """What each primitive is called with; tokens go to experts at random, some slots are empty."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    experts = torch.randint(size.E, (size.n,), generator=generator)
    order = experts.argsort(stable=True)
    offsets = torch.searchsorted(experts[order], torch.arange(size.E + 1)).to(device)
    x, W = draw(size.n, size.d), draw(size.E, size.m, size.d) / size.d**0.5
    # tokens in the order of experts, as the routed encode leaves them
    local = torch.rand(size.n, size.m, generator=generator).argsort(1)[:, : size.k]
    ids = (experts[order, None] * size.m + local).to(device)
    coefs = (draw(size.n, size.k) + 2).relu()  # 2 % of the slots are empty
    rows = W.reshape(-1, size.d)
    return {
        "expert_products": (x, order.to(device), W, draw(size.E, size.m), offsets),
        "relu_topk": (draw(size.n, size.m), size.k),
        "gather_sum": (coefs, ids, rows),
        "row_dots": (x, ids, rows),
        "scatter_sum": (coefs, ids, x, len(rows)),
        BY_EXPERT: (coefs, ids, x, len(rows), None, size.E),
    }


def primitive(backend: ModuleType, name: str) -> Callable[..., Any] | None:
    """The function behind a name of `PRIMITIVES`."""
    found: Callable[..., Any] | None = getattr(backend, name.split()[0], None)
    return found


# ---------------------------------------------------------------- is it right


def distance(mine: Tensor, wanted: Tensor) -> float:
    """|mine - wanted| / |wanted|, in float64 on the CPU."""
    mine, wanted = mine.detach().cpu().double(), wanted.detach().cpu().double()
    return float((mine - wanted).norm() / wanted.norm().clamp_min(1e-12))


def kernel_errors(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Distance of each primitive from its definition in float64."""
    errors = {}
    for name, args in arguments(size, dtype, device).items():
        exact = [
            a.cpu().double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args
        ]
        exact = [a.cpu() if torch.is_tensor(a) else a for a in exact]
        mine = primitive(triton_kernels, name)(*args)
        wanted = primitive(reference, name)(*exact)
        if name == "relu_topk":  # slots have no order
            mine, wanted = (
                torch.zeros(size.n, size.m, dtype=torch.float64).scatter_add(
                    1, ids.cpu(), acts.cpu().double()
                )
                for acts, ids in (mine, wanted)
            )
        errors[name] = distance(mine, wanted)
    return errors


def clear_tokens(sae: SwitchSAE, n: int, margin: float) -> Tensor:
    """Random tokens whose expert and k features win by `margin`, so that rounding flips none."""
    x = torch.randn(n, sae.config.hidden_size, dtype=torch.float64)
    k = sae.config.k
    assert k is not None
    with torch.no_grad():
        logits = sae(x).router_logits.topk(2).values
        sae.config.k = k + 1
        acts = sae.encode(x).acts.sort(descending=True).values
        sae.config.k = k
    clear = (acts[:, k - 1] - acts[:, k] > margin * acts[:, k - 1]) & (acts[:, k - 1] > 0)
    return x[clear & (logits[:, 0] - logits[:, 1] > margin)]


def model_errors(device: torch.device, autocast: bool, n: int = 1024) -> dict[str, float]:
    """Distance of the loss and each gradient from those of the model in float64 on the CPU."""
    torch.manual_seed(0)
    config = SwitchSAEConfig(
        hidden_size=64, num_features=512, num_experts=4, k=8, encoder_bias=True
    )
    sae = SwitchSAE(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if "b_" in name:
                parameter.normal_(std=0.1)
    exact = copy.deepcopy(sae).double()
    sae.to(device)
    x = clear_tokens(exact, n, margin=0.05 if autocast else 1e-3)
    wanted = exact(x).loss
    wanted.backward()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = sae(x.float().to(device)).loss
    loss.backward()
    grads = dict(sae.named_parameters())
    return {
        "loss": distance(loss, wanted),
        **{f"d {name}": distance(grads[name].grad, p.grad) for name, p in exact.named_parameters()},
    }


def optimizer_errors(device: torch.device, steps: int = 5) -> dict[str, float]:
    """Distance of each weight after steps of `SwitchSAEAdam` from those after `plain_step`."""
    torch.manual_seed(0)
    config = SwitchSAEConfig(
        hidden_size=64, num_features=512, num_experts=4, k=8, encoder_bias=True
    )
    mine = SwitchSAE(config).to(device)
    theirs = copy.deepcopy(mine)
    one, other = SwitchSAEAdam(mine, lr=1e-3), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for _ in range(steps):
        x = 3 * torch.randn(256, 64, device=device)
        for sae in (mine, theirs):
            sae.zero_grad()
            sae(x).loss.backward()
        for parameter, same in zip(mine.parameters(), theirs.parameters(), strict=True):
            same.grad.copy_(parameter.grad)  # so that a choice between near features cannot differ
        one.step()
        plain_step(theirs, other)
    other_weights = dict(theirs.named_parameters())
    return {name: distance(p, other_weights[name]) for name, p in mine.named_parameters()}


def bound_errors(device: torch.device) -> dict[str, float]:
    """How many tokens are wrongly taken for outliers, or not, after the bound was written again."""
    sae = SwitchSAE(SwitchSAEConfig(hidden_size=64, num_features=512, num_experts=4, k=8))
    sae.to(device)
    x, wrong = torch.randn(256, 64, device=device), 0
    for bound in (torch.inf, 8.0, torch.inf, 7.0):
        sae.outlier_norm.fill_(bound)
        for _ in range(2):
            silent = (sae(x).features.acts == 0).all(-1)
            wrong += int((silent != (x.norm(dim=-1) > bound)).sum())
    return {"outliers": float(wrong)}


def plain_step(sae: SwitchSAE, optimizer: torch.optim.Optimizer) -> None:
    """What `SwitchSAEAdam.step` does, one thing after the other."""
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    sae.project_decoder_grad()
    optimizer.step()
    sae.normalize_decoder()


def check(device: torch.device) -> list[tuple[str, float, float]]:
    """(what, distance, allowed) of everything that is compared."""
    size = ODD if device.type == "cuda" else SMALL
    found = []
    for dtype, allowed in TOLERANCE.items():
        for name, error in kernel_errors(size, dtype, device).items():
            found.append((f"{name} {str(dtype).removeprefix('torch.')}", error, allowed))
    for autocast, allowed in ((False, 1e-4), (True, 5e-2)):
        rule = "bfloat16 autocast" if autocast else "float32"
        for name, error in model_errors(device, autocast).items():
            found.append((f"model, {rule}: {name}", error, allowed))
    for name, error in optimizer_errors(device).items():
        found.append((f"optimizer: {name}", error, 1e-4))
    found.extend((name, error, 0.5) for name, error in bound_errors(device).items())
    return found


# ---------------------------------------------------------------- how fast is it


def medians(calls: dict[str, Callable[[], Any]], rounds: int = 30) -> dict[str, float]:
    """Milliseconds of each call; rounds go over all calls, and the cache is flushed before each."""
    # as long as the host takes to launch a call, so that the device has not to wait for it
    flush = torch.empty(2**31, dtype=torch.int8, device="cuda")
    for call in calls.values():
        for _ in range(3):  # compiles and tunes
            call()
    events: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs)
        for name, pairs in events.items()
    }


def limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large product, and bytes/s of a large copy, read and written."""
    square = torch.randn(GEMM, GEMM, device=device, dtype=dtype)
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    found = medians({"gemm": lambda: square @ square, "copy": lambda: target.copy_(source)}, 9)
    return 2 * GEMM**3 / (1e-3 * found["gemm"]), 2 * COPIED / (1e-3 * found["copy"])


def least_milliseconds(
    s: Size, item: int, gemm_rate: float, memory_rate: float
) -> dict[str, float]:
    """What a primitive takes at least: memory once over, rows of W from L2, FLOP of a GEMM."""
    tokens, weights = s.n * s.d * item, s.E * s.m * s.d * item
    pre, slots = s.n * s.m * item, s.n * s.k * (item + 8)
    rows = s.n * s.k * s.d * item / L2_RATE
    flop = 2 * s.n * s.m * s.d / gemm_rate
    seconds = {
        "expert_products": max((tokens + weights + pre) / memory_rate, flop),
        "relu_topk": (pre + slots) / memory_rate,
        "gather_sum": max((tokens + weights + slots) / memory_rate, rows),
        "row_dots": max((tokens + weights + slots) / memory_rate, rows),
        "scatter_sum": max((tokens + weights + slots) / memory_rate, rows),
        BY_EXPERT: max((tokens + weights + slots + 2 * pre) / memory_rate, flop),
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def time_primitives(size: Size, dtype: torch.dtype, device: torch.device) -> list[tuple[str, ...]]:
    """Rows of the table: each primitive, the eager one where there is one, and the limit."""
    args = arguments(size, dtype, device)
    calls: dict[str, Callable[[], Any]] = {}
    for name in PRIMITIVES:
        for backend in (triton_kernels, eager):
            label = f"{name} {backend.__name__}"
            calls[label] = partial(primitive(backend, name), *args[name])
    found = medians(calls)
    least = least_milliseconds(size, dtype.itemsize, *limits(dtype, device))
    rows = []
    for name in PRIMITIVES:
        other = found[f"{name} {eager.__name__}"]
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        rows.append(_row(label, found[f"{name} {triton_kernels.__name__}"], least[name], other))
    return rows


def time_adam(size: Size, device: torch.device) -> list[tuple[str, ...]]:
    """A row of the table: Adam with projection and unit rows over a decoder, and torch's alone."""
    shape = (size.E * size.m, size.d)
    w, g, mean, square = (torch.rand(shape, device=device) for _ in range(4))
    step = torch.ones((), device=device)
    rule: dict[str, Any] = {"lr": 1e-4, "eps": 1e-8}
    mine = partial(
        triton_kernels.adam_rows,
        *(w, g, mean, square, step),
        unit_rows=True,
        scale=torch.ones((), device=device),
        betas=(0.9, 0.999),
        **rule,
    )
    theirs = partial(
        torch._fused_adam_,
        *([w], [g], [mean], [square], [], [step]),
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        **rule,
    )
    found = medians({"mine": mine, "theirs": theirs})
    limit = 1e3 * 28 * w.numel() / limits(torch.float32, device)[1]
    return [_row("adam_rows float32; other: torch's alone", found["mine"], limit, found["theirs"])]


def _row(what: str, mine: float, limit: float | None, other: float | None) -> tuple[str, ...]:
    share = "" if limit is None else f"{limit / mine:.2f}"
    return (
        what,
        f"{mine:.3f}",
        "" if limit is None else f"{limit:.3f}",
        share,
        "" if other is None else f"{other:.3f}",
    )


def our_steps(size: Size, x: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, SwitchSAE]]:
    """A whole training step under bfloat16 autocast in several forms, and its passes alone; and the
    SAEs that they train."""
    torch.manual_seed(0)
    config = SwitchSAEConfig(
        hidden_size=size.d, num_features=size.E * size.m, num_experts=size.E, k=size.k
    )
    saes = [SwitchSAE(config).to(x.device) for _ in range(3)]
    plain, mine, compiled = saes
    adam = torch.optim.Adam(plain.parameters(), lr=1e-4, fused=True)
    optimizers = [SwitchSAEAdam(sae, lr=1e-4) for sae in (mine, compiled)]
    forward = torch.compile(compiled) if x.is_cuda else compiled

    def passes(sae: SwitchSAE, forward: Any = None) -> None:
        sae.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = (sae if forward is None else forward)(x).loss
        loss.backward()

    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: (passes(mine), optimizers[0].step()),
        "plain": lambda: (passes(plain), plain_step(plain, adam)),
        "compiled": lambda: (passes(compiled, forward), optimizers[1].step()),
        "passes": lambda: passes(mine),
    }
    return calls, {"step": mine, "plain": plain, "compiled": compiled}


@torch.no_grad()
def state_of(sae: SwitchSAE, x: Tensor) -> str:
    """What a step's time may depend on: is anything nan, or are some features or experts hot."""
    output = sae(x)
    active, E = output.features.ids[output.features.acts > 0], sae.config.num_experts
    hottest = torch.bincount(active, minlength=1).max()
    experts = torch.bincount(output.router_logits.argmax(-1), minlength=E)
    return (
        f"loss {float(output.loss):.4f}, {len(active) / len(x):.1f} active features a token, the "
        f"hottest on {int(hottest)} tokens, experts on {int(experts.min())} to {int(experts.max())}"
    )


def as_graph(step: Callable[[], Any]) -> Callable[[], Any]:
    """The same step as one CUDA graph: what the device takes, without the host's calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def sparsify_step(size: Size, x: Tensor) -> Callable[[], None] | None:
    """The same step of sparsify at equal width and k, in its own bfloat16 autocast, if it is
    installed."""
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    sae = SparseCoder(
        size.d, SparseCoderConfig(num_latents=size.E * size.m, k=size.k), device=x.device
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        sae(x).fvu.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        sae.set_decoder_norm_to_unit_norm()

    return step


def time_steps(
    size: Size, device: torch.device
) -> tuple[list[tuple[str, ...]], dict[str, Callable[[], Any]]]:
    """Rows of the table: the training step beside its floor and sparsify's; and what was timed."""
    x = torch.randn(size.n, size.d, device=device)
    calls, saes = our_steps(size, x)
    if device.type == "cuda":
        again, others = our_steps(size, x)
        calls["graph"], saes["graph"] = as_graph(again["step"]), others["step"]
    theirs = sparsify_step(size, x)
    if theirs is not None:
        calls["sparsify"] = theirs
    found = medians(calls)
    for name, sae in saes.items():
        print(f"{name}: {state_of(sae, x)}", file=sys.stderr)
    torch.cuda.reset_peak_memory_stats()
    calls["step"]()
    peak = torch.cuda.max_memory_allocated() / 2**30
    other, busy = found.get("sparsify"), {}
    if device.type == "cuda":
        busy = {name: device_time(calls[name]) for name in ("step", "sparsify") if name in calls}
    rows = [
        _row(
            f"training step, bf16 autocast (peak {peak:.2f} GiB)", found["step"], STEP_FLOOR, other
        )
    ]
    told = {
        "graph": "the same as a CUDA graph",
        "compiled": "the same, SAE by torch.compile",
        "plain": "the same with clip, project, torch's fused Adam, normalize",
        "passes": "its forward and backward",
    }
    for name, text in told.items():
        if name in found:
            rows.append(_row(text, found[name], None if name == "passes" else STEP_FLOOR, None))
    if busy:
        text = "its kernels alone, as on a host that never keeps them waiting"
        rows.insert(1, _row(text, busy["step"], STEP_FLOOR, busy.get("sparsify")))
    return rows, calls


def device_time(call: Callable[[], Any], times: int = 5) -> float:
    """Milliseconds that the device computes in a call, whatever the host takes to launch it."""
    kinds = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    kernels = (
        event
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation  # which spans kernels
    )
    return sum(event.time_range.elapsed_us() for event in kernels) / times / 1e3


def profile(calls: dict[str, Callable[[], Any]]) -> str:
    """Where the device's time of some calls goes, kernel by kernel, in the state they are in."""
    parts = []
    for name, call in calls.items():
        with torch.profiler.profile(
            activities=list(torch.profiler.supported_activities())
        ) as found:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        averages = found.key_averages()
        parts.append(f"5 times: {name}")
        parts.extend(
            averages.table(sort_by=key, row_limit=40, max_name_column_width=60)
            for key in ("self_cuda_time_total", "self_cpu_time_total")
        )
    return "\n".join(parts)


def table(rows: list[tuple[str, ...]], size: Size) -> str:
    lines = [
        f"**{torch.cuda.get_device_name()}**, torch {torch.__version__}, "
        f"triton {triton_kernels.triton.__version__}; {size}. Limits: see `least_milliseconds`; a "
        "step's is an H100's. Other: the eager backend of a primitive, sparsify's whole step.",
        "",
        "| | ms | limit, ms | limit / ms | other, ms |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--check", action="store_true", help="compare only, time nothing")
    parser.add_argument("--profile", type=Path, help="where a step's time goes, to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    declined = triton_kernels.why_not(device, torch.bfloat16)
    if declined:
        print(declined, file=sys.stderr)
        return 1
    found = check(device)
    wrong = [row for row in found if not row[1] <= row[2]]  # nan is wrong too
    for what, error, allowed in wrong:
        print(f"wrong: {what} is {error:.1e} off; allowed are {allowed:.0e}", file=sys.stderr)
    worst = max(error / allowed for _, error, allowed in found)
    print(f"{len(found)} comparisons, the worst at {worst:.2f} of its tolerance", file=sys.stderr)
    if wrong:
        return 1
    if options.check:
        return 0
    if device.type != "cuda":
        print("no CUDA device here, so nothing was timed", file=sys.stderr)
        return 0
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float32)
        for row in time_primitives(FULL, dtype, device)
    ] + time_adam(FULL, device)
    steps, calls = time_steps(FULL, device)
    result = table(rows + steps, FULL)
    print(result)
    if options.write:
        options.write.write_text(result)
    if options.profile:
        options.profile.write_text(profile(calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
