"""Train, calibrate, measure and describe this SAE: from text files to this folder.

    python train.py TRAIN.parquet VALIDATION.parquet --cache CACHE_FOLDER

Harvests the residual stream of SmolLM2-135M-Instruct once (layers after the hookpoint are not run),
trains from that cache in a plain PyTorch loop, stores the calibration in the checkpoint, measures
on the validation text, and writes config, weights, metrics, feature descriptions and README beside
this file. Stages that are done are not done again: a killed harvest goes on where it stopped.

Text files are parquet with a column `text`. The outlier policy (first position of a context and
tokens of more than 6 times the median norm are left out) is kept in the checkpoint.
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hf_switch_sae import SwitchSAE, hook_residual
from hf_switch_sae.demo import load_demo_lm

HERE = Path(__file__).parent
LAYER, CONTEXT, WIDTH = 15, 256, 576
SUBFOLDER = HERE / f"layers.{LAYER}.resid_post"


class Reached(Exception):
    """The hookpoint has been reached; the layers after it are not needed."""


def pack(tokenizer, path: Path, limit: int) -> np.ndarray:
    """Documents, an end-of-text token after each, cut into [contexts, CONTEXT] uint16."""
    texts, ids = pq.read_table(path, columns=["text"])["text"].to_pylist(), []
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for start in range(0, len(texts), 500):
        for document in tokenizer(texts[start : start + 500])["input_ids"]:
            ids += [*document, end]
        if len(ids) >= limit:
            break
    count = min(len(ids), limit) // CONTEXT
    return np.array(ids[: count * CONTEXT], dtype=np.uint16).reshape(count, CONTEXT)


def harvest(lm: nn.Module, tokenizer, path: Path, out: Path, limit: int) -> None:
    """Residual streams of a text file, position 0 left out, as bfloat16 bits beside their
    tokens."""
    tokens_file, stream_file = out.with_suffix(".tokens.npy"), out.with_suffix(".resid.npy")
    done_file = out.with_suffix(".json")
    if not tokens_file.exists():
        np.save(tokens_file, pack(tokenizer, path, limit))
    tokens = np.load(tokens_file)
    shape = (len(tokens), CONTEXT - 1, WIDTH)
    done = json.loads(done_file.read_text())["done"] if done_file.exists() else 0
    mode = "r+" if stream_file.exists() else "w+"
    stream = np.lib.format.open_memmap(stream_file, mode=mode, dtype=np.uint16, shape=shape)
    box: list[Tensor] = []

    def take(residual: Tensor) -> None:
        box.append(residual[:, 1:].to(torch.bfloat16))
        raise Reached

    with torch.inference_mode(), hook_residual(lm, LAYER, take):
        for start in range(done, len(tokens), 8):
            try:
                ids = torch.from_numpy(tokens[start : start + 8].astype(np.int64))
                lm(input_ids=ids, use_cache=False)
            except Reached:
                stream[start : start + 8] = box.pop().contiguous().view(torch.uint16).numpy()
            if start % 800 == 0:
                stream.flush()
                done_file.write_text(json.dumps({"done": start}))
                print(f"harvest {path.name}: {start} of {len(tokens)} contexts", flush=True)
    stream.flush()
    done_file.write_text(json.dumps({"done": len(tokens)}))


class Cache:
    """Harvested residual streams, read in shuffled order."""

    def __init__(self, out: Path) -> None:
        self.tokens = np.load(out.with_suffix(".tokens.npy"))
        self.stream = np.load(out.with_suffix(".resid.npy"), mmap_mode="r")
        self.contexts = json.loads(out.with_suffix(".json").read_text())["done"]
        self.outlier_norm = math.inf

    def rows(self, contexts: np.ndarray) -> Tensor:
        bits = torch.from_numpy(np.ascontiguousarray(self.stream[np.sort(contexts)]))
        return bits.view(torch.bfloat16).float()

    def batches(self, size: int, epochs: int, seed: int, group: int = 256):
        """Batches [size, WIDTH] of ordinary tokens, shuffled over `group` contexts at a time."""
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        left = torch.empty(0, WIDTH)
        for _ in range(epochs):
            order = rng.permutation(self.contexts)
            for start in range(0, len(order), group):
                x = self.rows(order[start : start + group]).reshape(-1, WIDTH)
                x = torch.cat([left, x[x.norm(dim=-1) <= self.outlier_norm]])
                x = x[torch.randperm(len(x), generator=generator)]
                whole = len(x) // size * size
                yield from x[:whole].split(size)
                left = x[whole:]


def train(cache: Cache, sae: SwitchSAE, args: argparse.Namespace, log: Path) -> int:
    """Train in place; returns the number of tokens seen."""
    chosen = np.random.default_rng(0).permutation(cache.contexts)[:200]
    sample = cache.rows(chosen).reshape(-1, WIDTH)
    cache.outlier_norm = 6 * float(sample.norm(dim=-1).median())
    sample = sample[sample.norm(dim=-1) <= cache.outlier_norm]
    with torch.no_grad():
        sae.outlier_norm.fill_(cache.outlier_norm)
        sae.input_scale.fill_(math.sqrt(WIDTH / float(sample.square().sum(-1).mean())))
        for bias in (sae.b_dec, sae.b_router):
            bias.copy_(sample.mean(0) * sae.input_scale)
    total = int(cache.contexts * (CONTEXT - 1) * args.epochs / args.batch)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr, fused=True)
    warm, decay = 100, 0.7 * total

    def share(step: int) -> float:
        """Up over `warm` steps, down to 0 over the last 30 % of them."""
        return min(1, (step + 1) / warm, max(0.0, (total - step) / (total - decay)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    sae.train()
    started, tokens = time.time(), 0
    for step, x in enumerate(cache.batches(args.batch, args.epochs, args.seed)):
        output = sae(x)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.project_decoder_grad()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        sae.normalize_decoder()
        tokens += len(x)
        if step % 200 == 0:
            line = {
                "step": step,
                "tokens": tokens,
                "fvu": round(output.fvu.item(), 4),
                "balance": round(output.router_aux_loss.item(), 4),
                "lr": round(schedule.get_last_lr()[0], 6),
                "tokens_per_s": round(tokens / (time.time() - started)),
            }
            print(line, flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if args.steps and step + 1 >= args.steps:
            break
    sae.eval()
    return tokens


@torch.no_grad()
def measure_stream(sae: SwitchSAE, cache: Cache) -> dict[str, float]:
    """FVU, L0, unused share and expert load on the validation text's ordinary tokens."""
    x = cache.rows(np.arange(cache.contexts)).reshape(-1, WIDTH)
    x = x[~sae.is_outlier(x)]
    mean, error, active = x.mean(0), 0.0, 0
    fired = torch.zeros(sae.config.num_features)
    for part in x.split(4096):
        features = sae.encode(part)
        error += float((part - sae.decode(features)).double().square().sum())
        active += int((features.acts > 0).sum())
        fired.index_add_(0, features.ids.flatten(), (features.acts > 0).float().flatten())
    variance = float((x - mean).double().square().sum())
    load = fired.reshape(sae.config.num_experts, -1).sum(1)
    return {
        "fvu": error / variance,
        "l0": active / len(x),
        "dead_share": float((fired == 0).float().mean()),
        "expert_load_max_over_mean": float(load.max() / load.mean()),
        "tokens": len(x),
    }


@torch.no_grad()
def measure_lm(lm: nn.Module, sae: SwitchSAE, tokens: np.ndarray) -> dict[str, float]:
    """Next-token loss clean, spliced and mean-ablated, and KL(clean || spliced), in nats per
    token."""
    mean = sae.b_dec.float() / sae.input_scale

    def ablate(residual: Tensor) -> Tensor:
        outlier = sae.is_outlier(residual)[..., None]
        return torch.where(outlier, residual, mean.to(residual.dtype))

    sums, count = Counter(), 0
    for start in range(0, len(tokens), 4):
        ids = torch.from_numpy(tokens[start : start + 4].astype(np.int64))
        logits = {"clean": lm(ids).logits[:, 1:-1].float().log_softmax(-1)}
        with sae.attach(lm, splice=True):
            logits["spliced"] = lm(ids).logits[:, 1:-1].float().log_softmax(-1)
        with hook_residual(lm, LAYER, ablate):
            logits["mean"] = lm(ids).logits[:, 1:-1].float().log_softmax(-1)
        for name, value in logits.items():
            sums[name] -= float(value.gather(-1, ids[:, 2:, None]).sum())
        clean = logits["clean"]
        sums["kl"] += float((clean.exp() * (clean - logits["spliced"])).sum())
        count += ids[:, 2:].numel()
    ce = {name: value / count for name, value in sums.items()}
    return {
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_mean_ablated": ce["mean"],
        "ce_recovered": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "kl": ce["kl"],
        "ce_tokens": count,
    }


@torch.no_grad()
def describe(sae: SwitchSAE, cache: Cache, tokenizer, contexts: int = 6000) -> dict[str, list[str]]:
    """For each feature the words it fires on most strongly."""
    keep = 12
    best = torch.zeros(sae.config.num_features, keep)
    place = torch.zeros(sae.config.num_features, keep, dtype=torch.int64)
    count = min(contexts, cache.contexts)
    for start in range(0, count, 16):
        chosen = np.arange(start, min(start + 16, count))
        features = sae.encode(cache.rows(chosen).reshape(-1, WIDTH))
        ids, acts = features.ids.flatten(), features.acts.flatten().float()
        at = (torch.arange(len(features)) + start * (CONTEXT - 1)).repeat_interleave(features.k)
        # strongest first, so that the first occurrences of each feature are its best here
        order = acts.argsort(descending=True)
        order = order[ids[order].argsort(stable=True)]
        ids, acts, at = ids[order], acts[order], at[order]
        first = torch.searchsorted(ids, torch.arange(sae.config.num_features))
        rank = torch.arange(len(ids)) - first[ids]
        few = (rank < keep) & (acts > 0)
        new_best, new_place = torch.zeros_like(best), torch.zeros_like(place)
        new_best[ids[few], rank[few]] = acts[few]
        new_place[ids[few], rank[few]] = at[few]
        both, both_place = torch.cat([best, new_best], 1), torch.cat([place, new_place], 1)
        best, slot = both.topk(keep, dim=1)
        place = both_place.gather(1, slot)
    table = {}
    for feature in range(sae.config.num_features):
        spots = [int(p) for p, act in zip(place[feature], best[feature], strict=True) if act > 0]
        if not spots:
            continue
        where = [(spot // (CONTEXT - 1), spot % (CONTEXT - 1) + 1) for spot in spots]
        words = Counter(tokenizer.decode(int(cache.tokens[c, p])).strip() for c, p in where)
        table[str(feature)] = [word for word, _ in words.most_common(4) if word]
    return table


CARD = """---
library_name: hf_switch_sae
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: adapter
pipeline_tag: feature-extraction
tags: [sparse-autoencoder, sae, switch-sae, mechanistic-interpretability, interpretability, llama]
---
# A Switch SAE of SmolLM2-135M-Instruct

{config[num_features]} features in {config[num_experts]} experts over the residual stream after
block {layer}, k = {config[k]}. Written by `train.py` in this folder; do not edit by hand.

```python
from hf_switch_sae import SwitchSAE, Steer

sae = SwitchSAE.from_pretrained("this folder", subfolder="{subfolder}")
with sae.attach(lm) as session:
    session.edit(Steer(1234, 0.5))
    lm.generate(**inputs)
```

| measured on the validation text | |
|---|---|
{table}

* Base model: the Q4_1 GGUF of SmolLM2-135M-Instruct, dequantised to float32; hookpoint
  `{config[hookpoint]}`.
* Input: contexts of {context} tokens, documents packed with an end-of-text token after each. The
  first position and tokens of more than 6 times the median norm ({outlier_norm:.0f}) are left
  out, in training as in use.
* FVU is the squared error over the squared deviation from the mean token (0 exact). CE recovered
  is (mean-ablated - spliced) / (mean-ablated - clean). Dead: never active on the validation tokens.
* Training: {trained} tokens of English prose, manuals and dictionaries, several passes over
  {unique} different ones, by `python train.py TRAIN.parquet VALIDATION.parquet --cache FOLDER`;
  settings in `layers.15.resid_post/metrics.json`, loss curve in `train_log.jsonl` beside it.
* Limits: a small model and an archaic, technical corpus (no news, web, chat or code). Activations
  include the router's probability. Feature descriptions (`features.json`) are the words of their
  strongest activations, nothing more. Steering above a strength of about 1 costs fluency.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3_686_400)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--features", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="stop early, to try things out")
    parser.add_argument("--out", type=Path, default=SUBFOLDER)
    parser.add_argument("--no-lm", action="store_true", help="train and measure from the cache")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    lm, tokenizer = load_demo_lm("package")
    if not args.no_lm:
        lm.to(torch.bfloat16)
        harvest(lm, tokenizer, args.validation, args.cache / "val", 150_000)
        harvest(lm, tokenizer, args.train, args.cache / "train", args.tokens)
        lm, tokenizer = load_demo_lm("package")
    training, validation = Cache(args.cache / "train"), Cache(args.cache / "val")
    torch.manual_seed(args.seed)
    sae = SwitchSAE.for_lm(
        lm,
        LAYER,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        num_features=args.features,
        num_experts=args.experts,
        k=args.k,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (log := args.out / "train_log.jsonl").unlink(missing_ok=True)
    tokens = train(training, sae, args, log)
    metrics = measure_stream(sae, validation)
    print(json.dumps(metrics, indent=2), flush=True)
    starts = range(0, min(4000, training.contexts), 16)
    sae.calibrate(training.rows(np.arange(s, s + 16)).reshape(-1, WIDTH) for s in starts)
    if not args.no_lm:
        metrics |= measure_lm(lm, sae, validation.tokens[:120])
        print(json.dumps(metrics, indent=2), flush=True)
    sae.config.metrics = {name: round(value, 5) for name, value in metrics.items()}
    sae.to(torch.bfloat16)
    sae.save_pretrained(args.out)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    facts = {"train_tokens": tokens, "settings": settings}
    (args.out / "metrics.json").write_text(json.dumps(sae.config.metrics | facts, indent=2) + "\n")
    table = describe(sae, training, tokenizer)
    lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in table.items())
    (args.out / "features.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    rows = "\n".join(f"| {name} | {value} |" for name, value in sae.config.metrics.items())
    card = CARD.format(
        config=sae.config.to_dict(),
        layer=LAYER,
        subfolder=SUBFOLDER.name,
        table=rows,
        context=CONTEXT,
        outlier_norm=float(sae.outlier_norm),
        trained=f"{tokens:,}",
        unique=f"{training.contexts * CONTEXT:,}",
    )
    if args.out == SUBFOLDER:
        (HERE / "README.md").write_text(card)


if __name__ == "__main__":
    main()
