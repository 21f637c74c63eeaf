"""Text -> shards of MiniLM's residual stream on disk -> batches, for runs that train from a cache.

A shard is a file of shuffled rows [ROWS, 384] in bfloat16 bits, from documents that no other shard
has; it is written beside and renamed, so a killed harvest goes on with the shard it was at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

LAYER, WINDOW, WIDTH = 3, 128, 384
ROWS, VALIDATION_ROWS = 400_000, 64_000
BATCH = 64  # windows per forward
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def windows(tokenizer, path: Path) -> Iterator[list[int]]:
    """[CLS], up to 126 wordpieces of one document, [SEP]; of the documents in their order."""
    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    body = WINDOW - 2
    for start in range(0, len(texts), 200):
        batch = tokenizer(texts[start : start + 200], add_special_tokens=False)["input_ids"]
        for ids in batch:
            for at in range(0, len(ids), body):
                part = ids[at : at + body]
                if len(part) >= 8:
                    yield [tokenizer.cls_token_id, *part, tokenizer.sep_token_id]


@torch.inference_mode()
def residuals_of(model, parts: list[list[int]]) -> Tensor:
    """The stream after block LAYER at all but the first and last position, [tokens, WIDTH]."""
    width = max(map(len, parts))
    ids, mask = (torch.zeros(len(parts), width, dtype=torch.int64) for _ in range(2))
    for row, part in enumerate(parts):
        ids[row, : len(part)] = torch.tensor(part)
        mask[row, : len(part)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    inner = mask.clone()
    inner[:, 0] = 0
    inner[torch.arange(len(parts), device=mask.device), mask.sum(1) - 1] = 0
    return states[inner.bool()].to(torch.bfloat16).cpu()


def harvest(model_folder: Path, texts: Path, cache: Path, name: str, shards: int, rows: int):
    """Write the shards `name-0.npy` ... that are missing; yields one line for each."""
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval().to(DEVICE)
    model.encoder.layer = model.encoder.layer[: LAYER + 1]
    source = windows(tokenizer, texts)
    for shard in range(shards):
        target = cache / f"{name}-{shard}.npy"
        # windows are dealt out by count of wordpieces, so a shard that is there is skipped unread
        parts, count = [], 0
        while count < rows:
            part = next(source)
            parts.append(part)
            count += len(part) - 2
        if target.exists():
            yield f"{target.name}: there"
            continue
        found, order = [], sorted(range(len(parts)), key=lambda i: len(parts[i]))
        for start in range(0, len(order), BATCH):
            found.append(residuals_of(model, [parts[i] for i in order[start : start + BATCH]]))
        stream = torch.cat(found)
        stream = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(shard))]
        beside = target.with_suffix(".part")
        with beside.open("wb") as file:
            np.save(file, stream[:rows].contiguous().view(torch.uint16).numpy())
        beside.rename(target)
        yield f"{target.name}: {rows} rows"


def rows_of(cache: Path, name: str, shard: int) -> Tensor:
    """A shard, [rows, WIDTH] bfloat16."""
    return torch.from_numpy(np.load(cache / f"{name}-{shard}.npy")).view(torch.bfloat16)


def batches(cache: Path, tokens: int, size: int, seed: int, passes: int = 1) -> Iterator[Tensor]:
    """Batches [size, WIDTH] float32 until `tokens` have been seen, over the first
    tokens / passes rows of the cache; the seed decides the order."""
    seen, unique = 0, tokens // passes
    for turn in range(passes):
        generator = torch.Generator().manual_seed(1000 * turn + seed)
        left = unique
        for shard in range(-(-unique // ROWS)):
            rows = rows_of(cache, "train", shard)[: min(left, ROWS)]
            left -= len(rows)
            rows = rows.to(DEVICE)
            for part in torch.randperm(len(rows), generator=generator).split(size):
                if len(part) == size:
                    seen += size
                    yield rows[part.to(DEVICE)].float()
