"""`hf-switch-sae query`: where a feature fires, which fire together, what fires on a text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_switch_sae.cli.loading import load_tokenizer
from hf_switch_sae.cli.options import Tokenizer, TokenizerGguf
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.store import Companion, FeatureStore, Hit


def query(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    feature: Annotated[
        int | None, typer.Option(help="Show where this feature fires most strongly.")
    ] = None,
    coactivation: Annotated[
        int | None, typer.Option(help="Show which features fire together with this one.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Show which features fire where this text occurs.")
    ] = None,
    quantiles: Annotated[
        bool, typer.Option(help="With --feature: sample its whole range of strengths.")
    ] = False,
    n: Annotated[int, typer.Option("-n", min=1, help="Lines to show.")] = 10,
    context: Annotated[int, typer.Option(min=0, help="Tokens to show before and after.")] = 8,
    tokenizer: Tokenizer = None,
    gguf_file: TokenizerGguf = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Ask a store of recorded features.

    Without --feature, --coactivation or --text, it says what the store holds.
    """
    if quantiles and feature is None:
        raise SwitchSAEError("--quantiles samples a feature's range: say which, with --feature.")
    if sum(asked is not None for asked in (feature, coactivation, text)) > 1:
        raise SwitchSAEError("one question at a time: --feature, --coactivation or --text.")
    opened = FeatureStore(store)
    if feature is None and coactivation is None and text is None:
        _show(_overview(opened), as_json)
        return
    try:
        opened.tokenizer = load_tokenizer(opened, tokenizer, gguf_file)
    except SwitchSAEError:
        if text is not None or tokenizer or gguf_file:
            raise  # else tokens are shown by their ids
    if coactivation is not None:
        _show([_companion(each) for each in opened.coactivation(coactivation, n)], as_json)
    elif text is not None:
        found_on = opened.features_of(text, n)
        if not found_on:
            print(_nothing_on(text), file=sys.stderr)
        _show([_companion(each) for each in found_on], as_json)
    elif quantiles:
        assert feature is not None
        # sample() takes the lines for each of five quantiles
        found = opened.sample(feature, n=max(1, n // 5), context=context)
        _show([_hit(hit, opened.tokenizer) for hits in found.values() for hit in hits], as_json)
    else:
        assert feature is not None
        hits = opened.top_tokens(feature, n, context)
        _show([_hit(hit, opened.tokenizer) for hit in hits], as_json)


def _overview(store: FeatureStore) -> list[dict[str, Any]]:
    made = asdict(store.provenance)
    counts = {"tokens": store.num_tokens, "shards": len(store.shards), "indexed": store.is_indexed}
    sizes = {f"bytes of {name}": size for name, size in store.disk_usage().items()}
    return [{name: value} for name, value in {**counts, **sizes, **made}.items()]


def _companion(companion: Companion) -> dict[str, Any]:
    return {
        "feature": companion.feature,
        "share": round(companion.share, 4),
        "mean_act": round(companion.mean_act, 4),
    }


def _nothing_on(text: str) -> str:
    sentence = f"{text!r} does not occur in the store as these tokens, or nothing fires on it."
    if text.startswith(" "):
        return sentence
    return f"{sentence} Inside a text, a word begins with its space: --text {' ' + text!r}."


def _hit(hit: Hit, tokenizer: Any) -> dict[str, Any]:
    line = {"act": hit.act, "document": hit.document, "position": hit.position}
    if tokenizer is None:
        return {**line, "tokens": list(hit.tokens), "at": hit.at}
    # decoded apart, so that the brackets stand right around the token
    before, token, after = (
        tokenizer.decode(list(part))
        for part in (
            hit.tokens[: hit.at],
            hit.tokens[hit.at : hit.at + 1],
            hit.tokens[hit.at + 1 :],
        )
    )
    return {**line, "text": f"{before}[{token}]{after}"}


def _show(lines: list[dict[str, Any]], as_json: bool) -> None:
    for line in lines:
        if as_json:
            print(json.dumps(line))
        else:
            print("  ".join(f"{name} {value!r}" for name, value in line.items()))
