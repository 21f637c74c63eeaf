"""What recording takes: bytes, memory and time on a real corpus, and queries of millions of tokens.

    python -m tests.bench.recording FOLDER [corpus cost synthetic] --corpus FILE [--write]

FOLDER takes the stores, which are some gigabytes with the largest synthetic one; every step goes on
where it was, so that it can be stopped by SIGTERM and called again, and times add up. `--write`
puts the tables into tests/bench/RECORDING.md. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_switch_sae import FeatureStore, SparseFeatures, SwitchSAE, record
from hf_switch_sae.demo import SAE, load_demo_lm
from hf_switch_sae.store import Provenance, TokenRows
from hf_switch_sae.text.documents import read_documents

from .cpu import machine, markdown, replace_section
from .timing import Table, seconds

RESULTS = Path(__file__).parent / "RECORDING.md"
HEAD = """# Recording, as measured

Written by `python -m tests.bench.recording FOLDER --corpus FILE --write`; no line is written by
hand. The corpus is English text, of which the first documents are taken.
"""
SYNTHETIC = {"num_features": 18_432, "num_experts": 1, "num_experts_per_token": 1, "k": 32}
SHARD = 1 << 17


@contextmanager
def counted(store: Path, step: str) -> Iterator[None]:
    """Add a step's seconds to what it took before it was stopped, and note its peak memory."""
    path = store.parent / f"{store.name}.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    start, before = time.perf_counter(), peak()
    try:
        yield
    finally:
        of = noted.setdefault(step, {"seconds": 0.0, "peak": 0.0, "before": 0.0})
        of["seconds"] += time.perf_counter() - start
        if peak() > of["peak"]:
            of["peak"], of["before"] = peak(), before
        path.write_text(json.dumps(noted))


def peak() -> float:
    """Largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def noted(store: Path, step: str) -> dict[str, float]:
    path = store.parent / f"{store.name}.json"
    return dict(json.loads(path.read_text())[step])


def ours() -> tuple[Any, Any, SwitchSAE]:
    lm, tokenizer = load_demo_lm()
    return lm.eval(), tokenizer, SwitchSAE.from_pretrained(SAE)


def corpus_table(options: argparse.Namespace) -> Table:
    """The first tokens of a corpus, recorded for SmolLM2's layer 15 by the released SAE."""
    path = options.folder / "corpus"
    if not path.exists() or FeatureStore(path).num_tokens < options.tokens:
        lm, tokenizer, sae = ours()
        with counted(path, "record"):
            record(lm, sae, str(options.corpus), path, tokenizer=tokenizer,
                   max_tokens=options.tokens, shard_tokens=options.shard_tokens)  # fmt: skip
    store = FeatureStore(path)
    if not store.is_indexed:
        with counted(path, "index"):
            store.index()
    size, tokens = store.disk_usage(), store.num_tokens
    acts = sum(len(rows.ids) for rows in store.rows())
    rows = [
        ("what", "value"),
        ("tokens", f"{tokens:,}"),
        ("features, experts", f"{store.num_features:,}, {store.provenance.num_experts}"),
        ("active features a token", f"{acts / tokens:.2f}"),
        ("bytes a token: shards", f"{size['tokens'] / tokens:.1f}"),
        ("bytes a token: index", f"{size['index'] / tokens:.1f}"),
        ("**bytes a token**", f"**{sum(size.values()) / tokens:.1f}**"),
    ]
    for step, name in (("record", "recording"), ("index", "indexing")):
        of = noted(path, step)
        rows.append((f"{name}: peak memory of the process, and before it began",
                     f"{of['peak']:.2f} GiB, {of['before']:.2f} GiB"))  # fmt: skip
    rows.append(("indexing: seconds", f"{noted(path, 'index')['seconds']:.1f}"))
    return [*rows, *query_rows(path)]


def cost_table(options: argparse.Namespace) -> Table:
    """What a recording takes besides the model's blocks, against what they take in the same run.

    Within a run, as runs of the same model differ by more than recording costs. All else counts:
    tokenising, embedding, encoding, writing, and what a run begins and ends with.
    """
    lm, tokenizer, sae = ours()
    texts, total = [], 0
    for document in read_documents(str(options.corpus)):
        texts.append(document.text)
        total += len(tokenizer(document.text)["input_ids"])
        if total >= options.cost_tokens:
            break
    since, blocks = 0.0, 0.0

    def begins(*_: Any) -> None:
        nonlocal since
        since = time.perf_counter()

    def ends(*_: Any) -> None:
        nonlocal blocks
        blocks += time.perf_counter() - since

    for block in lm.model.layers:  # hooks run in the order they came: before those that record
        block.register_forward_pre_hook(begins)
        block.register_forward_hook(ends)
    ratios = []
    for turn in range(options.turns + 1):
        blocks = 0.0
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            taken = seconds(
                lambda folder=folder: record(
                    lm, sae, texts, folder, tokenizer=tokenizer, progress=False
                )
            )
        if turn:  # the first is not counted
            ratios.append(taken / blocks)
    return [
        ("tokens", "recording, against the blocks in it", "min to max"),
        (f"{total:,}", f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to "
         f"{max(ratios):.3f} ({len(ratios)} runs)"),
    ]  # fmt: skip


def synthetic_table(options: argparse.Namespace) -> Table:
    """Stores made at the store's level: 32 acts a token, features of unlike frequency."""
    rows: Table = [("what", *(f"{tokens:,} tokens" for tokens in options.synthetic))]
    columns = []
    for tokens in options.synthetic:
        path = options.folder / f"synthetic-{tokens}"
        fill(path, tokens)
        store = FeatureStore(path)
        if not store.is_indexed:
            with counted(path, "index"):
                store.index()
        size = store.disk_usage()
        of = noted(path, "index")
        columns.append([
            ("bytes a token: shards", f"{size['tokens'] / tokens:.1f}"),
            ("bytes a token: index", f"{size['index'] / tokens:.1f}"),
            ("indexing: seconds", f"{of['seconds']:.0f}"),
            ("indexing: peak memory of the process", f"{of['peak']:.2f} GiB"),
            *query_rows(path),
        ])  # fmt: skip
    for cells in zip(*columns, strict=True):
        rows.append((cells[0][0], *(value for _, value in cells)))
    return rows


def fill(path: Path, tokens: int) -> None:
    """Documents of 512 tokens; a feature's frequency falls as a power of its rank."""
    made = Provenance(**SYNTHETIC, hookpoint="layers.15.resid_post", dataset={"kind": "random"})
    store = FeatureStore.create(path, made)
    count, k = made.num_features, 32
    frequency = 1 / (np.arange(count) + 300.0)
    cumulative = np.cumsum(frequency / frequency.sum())
    names = np.random.default_rng(0).permutation(count)
    for first in range(0, tokens // 512, SHARD // 512):
        last = min(first + SHARD // 512, tokens // 512) - 1
        if store.has_document(first):
            continue
        n, rng = (last - first + 1) * 512, np.random.default_rng(first)
        # one of each k-th of the frequencies, so that a token has a feature once
        at = np.searchsorted(cumulative, (np.arange(k) + rng.random((n, k))) / k)
        at = np.minimum(at, count - 1)
        acts = np.exp(rng.normal(0.5, 0.6, (n, k))).astype(np.float32)
        acts[:, 1:][at[:, 1:] == at[:, :-1]] = 0
        features = SparseFeatures(torch.from_numpy(acts), torch.from_numpy(names[at]), count)
        row = np.arange(n)
        token = rng.integers(0, 49_152, n)
        store.append(first, last, TokenRows.of(
            features, first + row // 512, row % 512, token, made.layout
        ))  # fmt: skip


def query_rows(path: Path, asked: int = 200) -> list[tuple[str, str]]:
    """Opening, and the time of questions about random features, each asked once."""
    opening = [seconds(lambda: FeatureStore(path).density()) for _ in range(5)]
    store = FeatureStore(path)
    density = store.density().numpy()
    rng = np.random.default_rng(0)
    features = rng.choice(np.flatnonzero(density > 0), asked)
    calls = {
        "top_tokens(n=20)": lambda feature: store.top_tokens(feature, 20),
        "sample()": lambda feature: store.sample(feature),
        "coactivation()": lambda feature: store.coactivation(feature),
    }
    rows = [("opening, with all densities", f"{1e3 * statistics.median(opening):.0f} ms")]
    for name, call in calls.items():
        few = features if name[0] == "t" else features[: asked // 10]
        taken = np.array([seconds(lambda f=int(f), call=call: call(f)) for f in few])
        rows.append((f"{name}: median, p95 of {len(few)} random features",
                     f"{1e3 * np.median(taken):.1f} ms, "
                     f"{1e3 * np.quantile(taken, 0.95):.1f} ms"))  # fmt: skip
    return rows


TABLES = {
    "corpus": ("SmolLM2-135M, layer 15, the released SAE, k = 32", corpus_table),
    "cost": ("Recording against the model, float32", cost_table),
    "synthetic": ("Synthetic stores: 18,432 features, 32 acts a token", synthetic_table),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the stores, which stay there")
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--corpus", type=Path, help="parquet, JSONL or text files")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the corpus to record")
    parser.add_argument("--shard-tokens", type=int, default=SHARD, help="as of `record`")
    parser.add_argument("--cost-tokens", type=int, default=16_384, help="to compare times on")
    parser.add_argument("--turns", type=int, default=5, help="runs to compare")
    parser.add_argument("--synthetic", type=int, nargs="*", default=[2_000_000, 20_000_000])
    parser.add_argument("--write", action="store_true", help="put them into RECORDING.md")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same call goes on"))
    for name in options.tables or TABLES:
        title, measure = TABLES[name]
        if name != "synthetic" and options.corpus is None:
            parser.error(f"{name} needs --corpus")
        body = f"## {title}\n\n{markdown(measure(options))}\n{machine()}\n"
        print(body, flush=True)
        if options.write:
            text = RESULTS.read_text() if RESULTS.exists() else HEAD
            RESULTS.write_text(replace_section(text, name, body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
