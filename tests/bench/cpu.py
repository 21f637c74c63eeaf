"""How fast a Switch SAE is on this machine, beside its peers and the machine's own limits.

    python -m tests.bench.cpu [limits forward train attach end-to-end memory] [--write]

All that is compared runs in one process, in turns; shown are medians, and ratios of them. `--write`
puts the tables into tests/bench/RESULTS.md and docs/speed.md, and five rows of them into README.md.
Run it on an idle machine: two of a machine's threads wait for each other, and a neighbor makes both
wait.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae import SwitchSAE, SwitchSAEAdam, residuals, use_backend

from .attached import attach_table
from .peers import installed
from .timing import TOKENS, D, F, K, Table, against, medians, ms, stream_of, switch_sae

HERE = Path(__file__).parent


# ---------------------------------------------------------------- limits


def limits() -> dict[str, float]:
    """FLOP/s of a matrix product; bytes/s of a + b in place, and of rows gathered from cache."""
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
    big, other = torch.randn(F * D), torch.randn(F * D)
    rows, ids = torch.randn(F // 32, D), torch.randint(F // 32, (TOKENS, K))
    weights = torch.rand(TOKENS, K)
    pre = torch.randn(TOKENS, F // 32)
    taken = medians(
        {
            "product": lambda: torch.mm(a, a, out=out),
            "add": lambda: other.add_(big),
            "gather": lambda: nn.functional.embedding_bag(
                ids, rows, per_sample_weights=weights, mode="sum"
            ),
            "topk": lambda: pre.topk(K, dim=1, sorted=False),
        }
    )
    return {
        "flops": 2 * 2048**3 / taken["product"],
        "bytes": 3 * 4 * F * D / taken["add"],
        "row_bytes": 4 * TOKENS * K * D / taken["gather"],
        "topk": taken["topk"],
    }


def floors(limit: dict[str, float], num_experts: int = 32) -> tuple[float, float]:
    """Seconds that a training step takes at least, hard and practical.

    Hard: the products of the one routed expert, and every weight, gradient and moment through
    memory once (28 bytes a parameter, less what stays in cache: 24). Practical: and four sparse
    passes over k rows a token, at the rate of rows in cache, and the top-k.
    """
    products = 2 * TOKENS * D * F / num_experts / limit["flops"]
    memory = 24 * 2 * F * D / limit["bytes"] + 8 * TOKENS * D / limit["bytes"]
    passes = 4 * 4 * TOKENS * K * D / limit["row_bytes"]
    return products + memory, products + memory + passes + limit["topk"]


def limits_table() -> Table:
    limit = limits()
    hard, practical = floors(limit)
    return [
        ("what", "value"),
        ("float32 matrix product, 2048^3", f"{limit['flops'] / 1e9:.0f} GFLOP/s"),
        ("a += b over 75 MB", f"{limit['bytes'] / 1e9:.0f} GB/s"),
        ("weighted sums of rows in cache", f"{limit['row_bytes'] / 1e9:.0f} GB/s"),
        ("torch.topk, 4096 x 768", f"{ms(limit['topk'])} ms"),
        ("hard floor of a training step", f"{ms(hard)} ms"),
        ("practical floor of a training step", f"{ms(practical)} ms"),
    ]


# ---------------------------------------------------------------- forward


@torch.no_grad()
def forward_table() -> Table:
    rows: Table = [("tokens, features, experts", "ours, ms", "sparsify", "dictionary_learning",
                    "SAELens", "dense masked", "limit, ms")]  # fmt: skip
    limit = limits()
    sizes = [(1, F, 64, "one warm token"), (1, F, 64, "one cold token"), (32, F, 64, "32"),
             (512, F, 64, "512"), (8192, F, 64, "8192"), (1, 262_144, 128, "one cold token"),
             (128, 262_144, 128, "128")]  # fmt: skip
    peers, width = {}, 0
    for n, num_features, num_experts, what in sizes:
        if num_features != width:
            peers, width = installed(D, num_features, K)[0], num_features
            if num_features > F:  # its gradients alone would fill the memory
                peers = {name: peers[name] for name in peers if name == "sparsify"}
        sae = switch_sae(num_experts, num_features)
        # a cold token goes to another expert than those before, so no weight is in cache
        pool = torch.randn(64 if "cold" in what else 1, n, D)
        turn = iter(range(10**9))

        def ours(sae: SwitchSAE = sae, pool: Tensor = pool, turn: Iterator[int] = turn) -> Tensor:
            return sae.decode(sae.encode(pool[next(turn) % len(pool)]))

        calls: dict[str, Callable[[], Any]] = {"ours": ours}
        for name, peer in peers.items():
            calls[name] = lambda peer=peer, pool=pool: peer.forward(pool[0])
        repeats = {"ours": 200 if n == 1 else 5 if n <= 512 else 1}
        repeats |= {name: 5 if n == 1 else 1 for name in peers}
        taken = medians(calls, 7 if n <= 512 else 3, repeats)
        m = num_features // num_experts
        least = max(
            2 * n * D * (m + num_experts) / limit["flops"],
            4 * D * (min(n, num_experts) * m + num_experts + n * K) / limit["bytes"],
        )
        others = (against(taken["ours"], taken.get(name)) for name in rows[0][2:6])
        size = f"{what}, {num_features}, {num_experts}"
        rows.append((size, ms(taken["ours"]), *others, ms(least)))
    return rows


# ---------------------------------------------------------------- training


def train_table() -> Table:
    x = torch.randn(TOKENS, D)
    sae, fused_sae, eager_sae = (switch_sae(32).train() for _ in range(3))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    fused, eager = SwitchSAEAdam(fused_sae, lr=1e-4), SwitchSAEAdam(eager_sae, lr=1e-4)

    def plain_loop() -> None:
        sae(x).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.project_decoder_grad()
        adam.step()
        sae.normalize_decoder()
        adam.zero_grad()

    def fused_loop() -> None:
        fused_sae(x).loss.backward()
        fused.step()
        fused.zero_grad()

    @use_backend("eager")
    def eager_loop() -> None:
        eager_sae(x).loss.backward()
        eager.step()
        eager.zero_grad()

    calls: dict[str, Callable[[], Any]] = {
        "ours, SwitchSAEAdam": fused_loop,
        "ours, torch's Adam": plain_loop,
        "ours, without a compiler": eager_loop,
    }
    peers, _ = installed(D, F, K)
    for name, peer in peers.items():
        calls[name] = lambda peer=peer: peer.update(x)
    repeats = {name: 5 for name in calls if name.startswith("ours")}
    taken = medians(calls, 5, repeats)
    hard, practical = floors(limits())
    best = taken["ours, SwitchSAEAdam"]
    rows: Table = [("training step", "ms", "against SwitchSAEAdam", "against torch's Adam")]
    for name, value in taken.items():
        rows.append(
            (name, ms(value), against(best, value), against(taken["ours, torch's Adam"], value))
        )
    rows.append(("practical floor", ms(practical), f"{practical / best:.2f} of it",
                 f"{practical / taken['ours, torch' + chr(39) + 's Adam']:.2f} of it"))  # fmt: skip
    rows.append(("hard floor", ms(hard), f"{hard / best:.2f} of it", "-"))
    return rows


# ---------------------------------------------------------------- end to end


def end_to_end_table() -> Table:
    """Training from text: the language model's forward and a training step, for each token."""
    from hf_switch_sae.demo import load_demo_lm

    lm, _ = load_demo_lm()
    d, width, batch = lm.config.hidden_size, 18_432, (4, 256)
    ids = torch.randint(1000, lm.config.vocab_size, batch)
    seen: list[Tensor] = []
    x = torch.randn(TOKENS, d)
    sae = switch_sae(32, width, d).train()
    optimizer = SwitchSAEAdam(sae, lr=1e-4)

    def ours() -> None:
        sae(x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> None:
        handle = lm.model.layers[15].register_forward_hook(
            lambda module, args, out: seen.append(stream_of(out)) or seen.clear()
        )
        try:
            lm(input_ids=ids)
        finally:
            handle.remove()

    peers, _ = installed(d, width, K)
    with torch.no_grad(), residuals(lm, [15]) as read:
        forwards = medians({"partial": lambda: read(input_ids=ids), "whole": whole}, 5)
    steps: dict[str, Callable[[], Any]] = {"ours": ours}
    steps |= {name: lambda peer=peer: peer.update(x) for name, peer in peers.items()}
    taken = medians(steps, 3, {"ours": 5})
    partial, full = (forwards[kind] / ids.numel() for kind in ("partial", "whole"))
    step = {name: value / TOKENS for name, value in taken.items()}
    rows: Table = [
        ("tokens a second", "language model alone", "with a training step", "share of the former"),
        _pace("ours: forward up to the last hooked block", partial, step["ours"]),
    ]
    if "sparsify" in step:
        rows.append(_pace("sparsify: the whole forward", full, step["sparsify"]))
    for name in ("dictionary_learning", "SAELens"):
        if name in step:
            rows.append(_pace(f"{name}: forward up to the layer", partial, step[name]))
    rows.append(("ours, from activations that are there", "-", f"{1 / step['ours']:.0f}", "-"))
    return rows


def _pace(name: str, forward: float, step: float) -> tuple[str, ...]:
    together = forward + step
    return name, f"{1 / forward:.0f}", f"{1 / together:.0f}", f"{forward / together:.2f}"


# ---------------------------------------------------------------- memory

_TRAIN_LARGE = """
import torch
from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig
sae = SwitchSAE(SwitchSAEConfig(hidden_size=768, num_features=262144, num_experts=128, k=32))
optimizer = {optimizer}
for _ in range(3):
    sae(torch.randn(4096, 768)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 / 1e9)  # not getrusage, which counts what the parent had
"""


def memory_table() -> Table:
    rows: Table = [("262,144 x 768 features, 4096 tokens a batch", "peak resident memory, GB")]
    for name, optimizer in {
        "SwitchSAEAdam": "SwitchSAEAdam(sae)",
        "torch's Adam, fused": "torch.optim.Adam(sae.parameters(), fused=True)",
    }.items():
        code = _TRAIN_LARGE.format(optimizer=optimizer)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        rows.append((name, f"{float(done.stdout.split()[-1]):.2f}"))
    return rows


# ---------------------------------------------------------------- as text

TABLES: dict[str, tuple[str, Callable[[], Table]]] = {
    "limits": ("Limits of this machine", limits_table),
    "forward": (
        f"Forward: encode and decode, d = {D}, k = {K}; columns: how many times longer",
        forward_table,
    ),
    "train": (
        f"Training step, {TOKENS} tokens, d = {D}, {F} features, 32 experts, k = {K}",
        train_table,
    ),
    "attach": ("Attached to SmolLM2-135M while it generates (7 paired runs)", attach_table),
    "end-to-end": (
        f"Training from text: SmolLM2-135M up to layer 15, 18432 features, {TOKENS} tokens a step",
        end_to_end_table,
    ),
    "memory": ("Memory", memory_table),
}


def markdown(rows: Table) -> str:
    head, *body = rows
    lines = [" | ".join(row) for row in (head, ("---",) * len(head), *body)]
    return "".join(f"| {line} |\n" for line in lines)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = re.findall(r"model name\s*: (.*)", info.read_text())[0]
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{cpu}, {threads}, torch {torch.__version__}"


def speed_section(results: str) -> str:
    """The tables of RESULTS.md that docs/speed.md shows."""
    found = []
    for name in ("train", "forward", "attach", "end-to-end", "memory"):
        match = re.search(rf"<!-- {name} -->\n(.*?)<!-- end", results, flags=re.S)
        if match is not None:
            found.append(match[1])
    return "\n" + "\n".join(found)


_PEERS = ("sparsify", "dictionary_learning", "SAELens")
_WARM, _ATTACHED = f"one warm token, {F}, 64", "ours, attached"


def speed_summary(results: str) -> str:
    """README's five rows: our time, and how many times longer each peer takes."""
    train, forward, attach = (rows_of(results, name) for name in ("train", "forward", "attach"))
    head = forward["tokens, features, experts"]
    rows: Table = [("on a CPU", "ours, ms", *_PEERS)]
    best = train["ours, SwitchSAEAdam"]
    rows.append((f"training step of {TOKENS:,} tokens", best[1], *(train[p][2] for p in _PEERS)))
    for name, tokens in ((_WARM, "1 token"), (f"512, {F}, 64", "512 tokens"),
                         (f"8192, {F}, 64", "8,192 tokens")):  # fmt: skip
        row = dict(zip(head, forward[name], strict=True))
        rows.append((f"encode and decode {tokens}", row["ours, ms"], *(row[p] for p in _PEERS)))
    ours = float(attach[_ATTACHED][1])
    others = (against(ours, float(attach[p][1])) for p in _PEERS)
    rows.append(("attached, per generated token", attach[_ATTACHED][1], *others))
    where = re.search(r"<!-- train -->.*?\n\n([^|\n]+)\n<!-- end", results, flags=re.S)
    return f"\n{markdown(rows)}\n{where[1] if where else ''}\n"


def rows_of(results: str, name: str) -> dict[str, tuple[str, ...]]:
    """A table of RESULTS.md by its first column; of several rows of one name, the first."""
    section = results.split(f"<!-- {name} -->\n")[1].split("<!-- end")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return {row[0]: tuple(row) for row in reversed(rows)}


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with what stands between the two marks of a section replaced, or added at the end."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{start}\n{body}{end}"
    if start not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--write", action="store_true", help="put them into RESULTS.md")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name, why in installed(8, 64, 4)[1].items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    for name in options.tables or TABLES:
        title, measure = TABLES[name]
        body = f"## {title}\n\n{markdown(measure())}\n{machine()}\n"
        print(body, flush=True)
        if options.write:
            results = HERE / "RESULTS.md"
            results.write_text(replace_section(results.read_text(), name, body))
    if options.write:
        results, root = (HERE / "RESULTS.md").read_text(), HERE.parents[1]
        for page, section in ((root / "README.md", speed_summary(results)),
                              (root / "docs/speed.md", speed_section(results))):  # fmt: skip
            page.write_text(replace_section(page.read_text(), "speed", section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
