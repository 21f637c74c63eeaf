"""Whole training runs, from text to an SAE: ours, sparsify's trainer, and the language model alone.

    python -m tests.bench.training FOLDER --corpus FILE [--write]

Runs are over the same text and take turns; shown are medians of rounds. Time counts from the first
batch to the last step: neither loading nor what a run does before and after. What is counted are
tokens that the model has read; our shuffle buffer is as large as a run, so that none is read in
vain. FOLDER takes a cache of the activations; from there it is tokens trained on that count.
`--write` puts the table into tests/bench/RESULTS.md. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_switch_sae import SwitchSAE, SwitchSAETrainer, SwitchSAETrainingArguments
from hf_switch_sae.demo import load_demo_lm
from hf_switch_sae.lm.residuals import partial_forward
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, CachedActivations, cache_activations

from .cpu import HERE, machine, markdown, replace_section
from .timing import TOKENS, Table

LAYER, EARLIER, CONTEXT, BOUNDARY = 15, 7, 256, "<|endoftext|>"
SAE = {"num_features": 18_432, "num_experts": 32, "k": 32}
SETTINGS = ActivationSettings(context=CONTEXT, boundary=BOUNDARY, tokens_per_pass=TOKENS // 2)
KEPT = TOKENS // CONTEXT * (CONTEXT - 2)  # of a step's: first and special tokens are left out


class Clock(TrainerCallback):
    """From the first batch of a run to its last step."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()


class Runs:
    """What takes turns; each returns tokens a second."""

    def __init__(self, folder: Path, corpus: str, tokens: int) -> None:
        self.lm, self.tokenizer = load_demo_lm()
        self.lm.eval().requires_grad_(False)
        self.folder, self.texts, self.ids = folder, list[str](), list[int]()
        end = self.tokenizer.convert_tokens_to_ids(BOUNDARY)
        for document in read_documents(corpus):  # more than is trained on: some rows are left out
            self.texts.append(document.text)
            self.ids += [*self.tokenizer(document.text)["input_ids"], end]
            if len(self.ids) >= 2 * tokens:
                break
        self.contexts = torch.tensor(self.ids[: tokens // CONTEXT * CONTEXT]).view(-1, CONTEXT)

    def lm_alone(self) -> float:
        """The language model up to the layer and no further."""
        start = time.perf_counter()
        with torch.inference_mode(), partial_forward(self.lm, [LAYER]) as run:
            for ids in self.contexts.split(TOKENS // CONTEXT):
                run(input_ids=ids, use_cache=False)
        return self.contexts.numel() / (time.perf_counter() - start)

    def ours(self, *layers: int, rows: Any = None) -> float:
        """`SwitchSAETrainer`, an SAE at each of the layers."""
        clock, steps = Clock(), self.contexts.numel() // TOKENS
        row_bytes = len(layers) * self.lm.config.hidden_size * self.lm.dtype.itemsize
        room = (steps * KEPT + TOKENS // 2) * row_bytes  # and a pass of the model
        live = {"activation_settings": replace(SETTINGS, buffer_bytes=room)}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, silent():
            saes = {at: SwitchSAE.for_lm(self.lm, at, **SAE).config for at in layers}
            args = SwitchSAETrainingArguments(
                output_dir=folder, per_device_train_batch_size=KEPT,
                num_train_tokens=steps * KEPT * (1 if rows is None else 4),
                start="none", calibration_rows=0, save_strategy="no", report_to="none",
                logging_steps=1000, disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            trainer = SwitchSAETrainer(
                saes, self.lm, args, self.texts if rows is None else rows,
                processing_class=self.tokenizer, callbacks=[clock],
                **(live if rows is None else {}),
            )  # fmt: skip
            trainer.train()
        counted = self.contexts.numel() if rows is None else trainer.state.num_input_tokens_seen
        return counted / (clock.end - clock.start)

    def cached(self) -> float:
        """The same from activations that were harvested before."""
        folder = self.folder / "cache"
        cache_activations(
            self.lm, LAYER, self.texts, folder, self.tokenizer, SETTINGS, progress=False
        )
        return self.ours(LAYER, rows=CachedActivations(folder, lm=self.lm))

    def sparsify(self) -> float:
        """sparsify's `Trainer`, as its command runs it: the model without a head, to its end."""
        from datasets import Dataset
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        data = Dataset.from_dict({"input_ids": self.contexts.tolist()}).with_format("torch")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, silent():
            sae = SparseCoderConfig(num_latents=SAE["num_features"], k=SAE["k"])
            config = TrainConfig(
                sae, batch_size=TOKENS // CONTEXT, layers=[LAYER], optimizer="adam",
                log_to_wandb=False, save_every=10**9, save_dir=folder,
            )  # fmt: skip
            trainer = Trainer(config, data, self.lm.base_model)
            start = time.perf_counter()
            trainer.fit()
        return self.contexts.numel() / (time.perf_counter() - start)


@contextlib.contextmanager
def silent() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def table(options: argparse.Namespace) -> Table:
    runs = Runs(options.folder, options.corpus, options.tokens)
    calls: dict[str, Callable[[], float]] = {
        "the language model alone, up to the layer": runs.lm_alone,
        "ours": lambda: runs.ours(LAYER),
        "ours, a second SAE at layer 7 beside it": lambda: runs.ours(EARLIER, LAYER),
        "ours, from a cache": runs.cached,
        "sparsify": runs.sparsify,
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            found[name].append(call())
            print(f"{name}: {found[name][-1]:.0f}", file=sys.stderr, flush=True)
    pace = {name: statistics.median(each) for name, each in found.items()}
    alone, theirs = pace["the language model alone, up to the layer"], pace["sparsify"]
    rows: Table = [("run", "tokens a second", "of the model alone", "against sparsify")]
    for name, each in pace.items():
        rows.append((name, f"{each:.0f}", f"{each / alone:.2f}", f"{each / theirs:.3g}x"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", required=True, help="as `hf-switch-sae train` takes it")
    parser.add_argument("--tokens", type=int, default=8 * TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    title = (
        f"Training runs from text: SmolLM2-135M, layer {LAYER}, {SAE['num_features']:,} features"
    )
    body = f"## {title}\n\n{markdown(table(options))}\n{machine()}\n"
    print(body)
    if options.write:
        results = HERE / "RESULTS.md"
        results.write_text(replace_section(results.read_text(), "trainers", body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
