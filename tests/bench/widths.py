"""What a training step takes, in time and memory, by how many features the SAE has.

    python -m tests.bench.widths [--write]

Each width is measured in a process of its own, with one thread: a step of the default recipe
(`SAE_PRESETS["default"]`, 512 tokens, float32), and the most memory that the process held, less
what it held before it made the SAE. Shown is the fastest of several steps, which other work on the
machine disturbs least. Beside it is one dense SAE of the same width.
`--write` puts the table into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from .cpu import HERE, machine, markdown, replace_section
from .timing import Table

WIDTHS = (6_144, 12_288, 24_576, 49_152, 98_304)
HIDDEN, PER_EXPERT, TOKENS = 768, 768, 512

_MEASURE = """
import json, sys, time
import torch
from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig
from hf_switch_sae.training import SAE_PRESETS

def most():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024  # not getrusage: the parent's counts

torch.set_num_threads(1)
hidden, features, experts, tokens, steps = map(int, sys.argv[1:])
before = most()
config = SwitchSAEConfig(hidden_size=hidden, num_features=features, num_experts=experts, k=32,
                         **SAE_PRESETS["default"])
sae = SwitchSAE(config).train()
optimizer = SwitchSAEAdam(sae, lr=1e-3)
x = torch.randn(tokens, hidden)
taken = []
for step in range(steps + 1):
    start = time.perf_counter()
    sae(x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    taken.append(time.perf_counter() - start)
parameters = sum(each.numel() for each in sae.parameters())
print(json.dumps([parameters, min(taken[1:]), most() - before]))
"""


def measured(features: int, experts: int, steps: int) -> tuple[int, float, int]:
    """Parameters, seconds a step and bytes of an SAE of so many features."""
    numbers = map(str, (HIDDEN, features, experts, TOKENS, steps))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *numbers], capture_output=True, text=True, check=True
    )
    parameters, seconds, held = json.loads(done.stdout.splitlines()[-1])
    return parameters, seconds, held


def table() -> Table:
    rows: Table = [("features", "experts", "parameters", "ms a step", "tokens a second",
                    "memory, GiB", "one dense SAE: ms a step")]  # fmt: skip
    for features in WIDTHS:
        experts = features // PER_EXPERT
        parameters, seconds, held = measured(features, experts, 9)
        _, dense, _ = measured(features, 1, 3)
        rows.append((f"{features:,}", str(experts), f"{parameters / 1e6:.1f} M",
                     f"{1e3 * seconds:.0f}", f"{TOKENS / seconds:,.0f}", f"{held / 2**30:.2f}",
                     f"{1e3 * dense:.0f}"))  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/training.md")
    options = parser.parse_args()
    name, cores, _, torch = machine().rsplit(", ", 3)
    body = f"\n{markdown(table())}\n{name}, {cores}, 1 thread, {torch}\n"
    print(body)
    if options.write:
        page = HERE.parents[1] / "docs/training.md"
        page.write_text(replace_section(page.read_text(), "widths", body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
