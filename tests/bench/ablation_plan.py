"""Which runs the recipe's defaults rest on, in what order of importance, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .recipes import Run


@dataclasses.dataclass(frozen=True)
class Part:
    """A table: what is asked, the settings that all its runs share, and what each has besides."""

    title: str
    question: str
    shared: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)

    @property
    def runs(self) -> list[Run]:
        """All of them, seeds together."""
        return [run for row in self.rows for run in self.of(row)]

    def of(self, row: str) -> list[Run]:
        """The runs of one row."""
        words = f"{self.shared} {row}".split()
        return [dataclasses.replace(Run.parse(words), seed=seed) for seed in self.seeds]


PAPER = "gate=p distill=0 router_init=uniform"
PLAN = [
    Part(
        "Targets",
        "Width 6144, dense and in 8 experts, at 1.0 M tokens; width 12288 in 8 experts, which is "
        "the FLOPs of a dense 1536, at 2.4 M.",
        "",
        (
            "tokens=1000000 experts=1",
            "tokens=1000000 experts=1 lr=0.0015",
            "tokens=1000000 experts=1 lr=0.0012 batch=256",
            "tokens=1000000 experts=1 lr=0.0016 batch=256",
            "tokens=1000000 experts=1 lr=0.0012 batch=256 beta2=0.99",
            "tokens=1000000 experts=1 lr=0.0012 batch=256 beta2=0.99 feature_init=data",
            "tokens=1000000 lr=0.002 distill_tau=0.02",
            "tokens=1000000 lr=0.0014 batch=256 distill_tau=0.02",
            "tokens=1000000 lr=0.0018 batch=256 distill_tau=0.02",
            "tokens=1000000 lr=0.0016 batch=256 distill_tau=0.02 beta2=0.99 feature_init=data",
            "tokens=1000000 lr=0.0016 batch=256 distill_tau=0.02 beta2=0.99 feature_init=data "
            "second=0.3",
            "tokens=2400000 experts=1 features=1536 lr=0.002",
            "tokens=2400000 features=12288 batch=1024 lr=0.0016 distill_tau=0.02",
            "tokens=2400000 features=12288 lr=0.0013 distill_tau=0.02",
        ),
        seeds=(0, 1),
    ),
    Part(
        "One change at 1.0 M tokens",
        "To the Switch SAE of the targets, between whose learning rates this one lies.",
        "tokens=1000000 lr=0.0016 batch=256 distill_tau=0.02",
        (
            "beta2=0.99",
            "auxk=0.03125",
            "warmup=0.01",
            "distill=0.2",
            "distill_tau=0.01",
            "balance=0.05",
            "decay=0.7",
        ),
        seeds=(0, 1),
    ),
    Part(
        "One change with beta2=0.99",
        "Where features begin, what becomes of those that are never active, what is balanced.",
        "tokens=1000000 lr=0.0016 batch=256 distill_tau=0.02 beta2=0.99",
        (
            "",
            "feature_init=data",
            "resample=4",
            "auxk=0.1 k_aux=256 dead_after=20000",
            "balance_by=active",
            "k_start=96",
            "feature_init=data balance_by=active",
            "feature_init=data lr=0.0012",
            "feature_init=data lr=0.002",
            "feature_init=data second=0.1",
            "feature_init=data second=0.3",
            "feature_init=data second=1",
            "feature_init=data second=0.3 lr=0.0012",
            "feature_init=data second=0.3 distill=0.3",
        ),
        seeds=(0, 1),
    ),
    Part(
        "Router and gate, width 1536",
        "What multiplies activations, what the router learns from, and where it begins.",
        "features=1536 lr=0.01",
        (
            "gate=p router_init=uniform",
            "",
            "router_init=uniform",
            "router_init=uniform distill=0.5",
            "distill_tau=0.02",
        ),
    ),
    Part(
        "Router and gate, width 6144",
        "The same where experts are wide.",
        "",
        (
            "gate=p distill=0 lr=0.006",
            "",
            "lr=0.006",
            "router_init=uniform lr=0.006",
        ),
    ),
    Part(
        "Router and gate, width 6144, first runs",
        "With the router of the paper; fade: its weights turn into 1 in the course of the run.",
        "tokens=398336",
        (
            "experts=1",
            f"{PAPER} activation=topk",
            PAPER,
            f"{PAPER} lr=0.006",
            f"{PAPER} balance=0.02",
            "gate=fade distill=0 router_init=uniform",
            "distill=0",
        ),
    ),
    Part(
        "Learning rate against steps and width",
        "What the law of the learning rate, `rate_by_steps`, is fitted to, besides the targets.",
        "",
        (
            "features=1536 tokens=100000 lr=0.005",
            "features=1536 tokens=100000 lr=0.01",
            "features=1536 tokens=100000 lr=0.02",
            "features=1536 lr=0.0025",
            "features=1536 lr=0.005",
            "features=1536 lr=0.01",
            "tokens=100000 lr=0.0025",
            "tokens=100000 lr=0.005",
            "tokens=100000 lr=0.01",
            "",
            "lr=0.006",
        ),
    ),
    Part(
        "Batch and schedule, width 1536",
        "One or two changes to the recipe, at the best learning rate.",
        "features=1536",
        (
            "lr=0.005",
            "lr=0.005 decay=0.7",
            "lr=0.005 distill_tau=0.02 balance=0.05",
            "lr=0.004 batch=256",
            "lr=0.006 batch=1024",
        ),
    ),
    Part(
        "Bias and average, width 1536",
        "One change at a time to the recipe.",
        "features=1536 lr=0.01",
        ("", "bias=1", "ema=0.99"),
    ),
]
DEFAULTS = """
| default | against | where |
|---|---|---|
| `activation=batch_topk` | topk | first runs |
| no router weight on activations (`apply_router_probs=False`) | `gate=p` | width 1536 |
| `router_best_expert_loss_coef=0.1` | `distill=0`, 0.5 | first runs; width 1536 |
| `router_best_expert_temperature=0.02` | 0.05: within noise | width 1536 |
| the router starts at clusters | `router_init=uniform` | widths 1536 and 6144 |
| features at rows (`start="data"`) | `feature_init=random`: 2-3 % worse; dense too | targets |
| `encoder_bias=False` | `bias=1`: within noise | bias and average |
| `decay_share=0.3` | 0.7: 1 % worse | batch and schedule; 1.0 M tokens |
| `router_aux_loss_coef=0.16` | 0.05: within noise, loads less even | batch and schedule |
| `per_device_train_batch_size=512` | 1024: 2.5 % worse; 256: 1 % better | batch and schedule |
| learning rate by `rate_by_steps` | 0.0025 to 0.02 | learning rate; targets |

At 1.0 M tokens a shorter warm-up, AuxK, a larger weight or a lower temperature of the best-expert
loss and less balance change FVU by less than a seed does; `beta2=0.99` of Adam lowers it by 1 % and
is no default yet: it was tried at one batch size. Nor is `second_expert_loss_coef=0.3` (`second`),
which lowers it by 2 %: a step takes half as long again. Not measured: Adam's other numbers, the
norm that gradients are clipped to, other numbers of experts. They are as usual.
""".strip()


def table(known: Mapping[Run, dict]) -> str:
    """ABLATIONS.md, of the runs that are known."""
    machines = sorted({line["machine"] for line in known.values()})
    lines = [
        "# What the training recipe's defaults rest on",
        "",
        "Written by `python -m tests.bench.ablations write`; do not edit by hand. Residual stream "
        "after block 3 of all-MiniLM-L6-v2, width 384, windows of 128 inside a document, first and "
        "last position left out; every token is seen once. FVU, L0 and unused features (never "
        "active) are of 64,000 held-out tokens; `batch_topk` by its threshold, as in use. "
        "k = 32, batch 512, 400,000 tokens, 8 experts, width 6144, learning rate 0.003 where "
        "nothing else stands. Where two seeds were run they differ by at most "
        f"{_of_a_seed(known):.1%}.",
        "",
        f"Machine: {'; '.join(machines)}. CPU seconds are of one thread beside "
        "other work; those marked * of the host of a GPU.",
        "",
        "A row's command: `python -m tests.bench.ablations run CACHE` and its settings; CACHE is "
        "what `harvest` fills.",
        "",
    ]
    lines += ["## Defaults and the part that each rests on", "", DEFAULTS, ""]
    for part in PLAN:
        rows = [(row, [known[run] for run in part.of(row) if run in known]) for row in part.rows]
        there = [(row, found) for row, found in rows if found]
        if not there:
            continue
        shared = f" All with `{part.shared}`." if part.shared else ""
        lines += [f"## {part.title}", "", part.question + shared, ""]
        lines += ["| settings | seeds | FVU | L0 | unused | gate p | load | CPU s |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        best = min(found[0]["fvu"] for _, found in there)
        lines += [_row(row, found, best) for row, found in there]
        missing = [row or "(the recipe)" for row, found in rows if not found]
        if missing:
            lines += ["", f"Not run yet: {', '.join(f'`{row}`' for row in missing)}."]
        lines.append("")
    return "\n".join(lines)


def _of_a_seed(known: Mapping[Run, dict]) -> float:
    """The largest share by which a row's seeds differ in FVU."""
    rows = (part.of(row) for part in PLAN for row in part.rows)
    found = ([known[run]["fvu"] for run in runs if run in known] for runs in rows)
    return max((max(each) / min(each) - 1 for each in found if each), default=0.0)


def _row(row: str, found: list[dict], best: float) -> str:
    fvu = " / ".join(f"{line['fvu']:.4f}" for line in found)
    fvu = f"**{fvu}**" if found[0]["fvu"] == best else fvu
    first, seeds = found[0], ", ".join(str(line["settings"]["seed"]) for line in found)
    host = "" if "threads" in first["machine"] else "*"
    gate = f"{first['p']:.2f}" if "p" in first else "-"
    load = f"{first['load_min']:.2f}-{first['load_max']:.2f}" if "p" in first else "-"
    return (
        f"| `{row or '(the recipe)'}` | {seeds} | {fvu} | {first['l0']:.1f} | "
        f"{first['unused']:.1%} | {gate} | {load} | {first['cpu_s']:.0f}{host} |"
    )
