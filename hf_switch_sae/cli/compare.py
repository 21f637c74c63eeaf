"""`hf-switch-sae compare`: SAEs of one place, trained and measured on the same rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_switch_sae import plots
from hf_switch_sae.cli.loading import load_sae, split_address
from hf_switch_sae.cli.options import as_typed, pairs_of, split_options, typed
from hf_switch_sae.comparison import SETS, compare, plan
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.hub.layout import COMPARISON, FIGURES
from hf_switch_sae.lm.loading import has_head, load_lm
from hf_switch_sae.lm.names import hookpoint_of
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, evaluate

_COLUMNS = ("fvu", "l0", "dead_share", "expert_load", "ce_recovered")


def compare_saes(
    context: typer.Context,
    cache: Annotated[Path, typer.Argument(help="Folder of activations to train on: see cache.")],
    held_out: Annotated[
        Path, typer.Option("--held-out", "--held_out", help="Another, of other text.")
    ],
    to: Annotated[Path, typer.Option(help="Folder of the comparison, new or to go on with.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(help="An SAE to measure too: folder or Hub id, :subfolder; several times."),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help='One to train, as "num_experts=8 num_features=6144"; several times.'),
    ] = None,
    named: Annotated[
        str | None, typer.Option("--set", help=f"SAEs to train: {', '.join(SETS)}.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the set's dense SAE.")] = None,
    experts: Annotated[int, typer.Option(min=2, help="Of the set's FLOP-matched SAE.")] = 8,
    layer: Annotated[
        str | None, typer.Option(help="Hookpoint, if the caches have several.")
    ] = None,
    preset: Annotated[str, typer.Option(help="default, or published: the paper's.")] = "default",
    lm: Annotated[
        str | None,
        typer.Option(help="The language model, to measure what its predictions lose too."),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option("--eval-dataset", "--eval_dataset", help="Held-out text for that."),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option("--eval-tokens", "--eval_tokens", min=1, help="Of it, at most."),
    ] = None,
    eval_context: Annotated[
        int, typer.Option("--eval-context", "--eval_context", min=1, help="Tokens at once.")
    ] = 256,
    gguf_file: Annotated[
        str | None,
        typer.Option("--gguf-file", "--gguf_file", help="A GGUF file in the LM's folder."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="To measure on.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Only say what would be trained.")
    ] = False,
) -> None:
    """Train Switch SAEs and dense ones on one cache, and measure them on the same held-out rows.

    CACHE comes first. The folder gets a subfolder for each SAE that is trained (what is there is
    not trained again, an interrupted run goes on), comparison.json, and figures.

    Options are also the fields of transformers.TrainingArguments (--num_train_tokens, --bf16,
    ...; --seed takes several) and of SwitchSAEConfig (--k, --activation, ...), for all runs; the
    words of --train are such fields too, of one.
    """
    run, of_sae, seeds = _told(context)
    told: list[Any] = list(train or [])
    if named is not None:
        if named not in SETS or width is None:
            raise ConfigError(
                f"--set {named} needs a --width; the sets are {', '.join(SETS)}."
                if named in SETS
                else f"no set {named!r}; there are {', '.join(SETS)}."
            )
        told = [
            *SETS[named](width, experts, int(of_sae.get("k") or 32), preset != "published"),
            *told,
        ]
    elif width is not None:
        raise ConfigError(f"--width {width} is of a set: give --set {next(iter(SETS))}.")
    planned = plan(told, of_sae, run, seeds, preset)
    if dry_run:
        for each in planned:
            print(each.name)
        return
    saes = dict(_load(each) for each in sae or [])
    if len(saes) < len(sae or []):
        raise ConfigError("an SAE is given twice with --sae.")
    found = compare(
        cache,
        held_out,
        to,
        train=planned,
        saes=saes,
        hookpoint=hookpoint_of(layer) if layer and layer.isdecimal() else layer,
        device=device,
        command=as_typed(context, {"device", "dry_run"}),
        more=_predictions(lm, gguf_file, eval_dataset, eval_tokens, eval_context),
    )
    print(table(found))
    # what was measured is there, whether it can be drawn or not
    can_draw = plots.can_draw(lambda sentence: print(sentence, file=sys.stderr))
    figures = plots.draw_comparison(found, to / FIGURES) if can_draw else []
    for file in [to / COMPARISON, *figures]:
        print(file)


def _load(address: str) -> tuple[str, SwitchSAE]:
    """A short name and the SAE, not on a GPU yet."""
    whole, subfolder = split_address(address)
    name = "-".join(part for part in (Path(whole).name, subfolder.replace("/", "-")) if part)
    loaded = load_sae(whole, subfolder)
    torch.nn.Module.to(loaded, "cpu")
    return name, loaded


def _predictions(
    lm: str | None, gguf_file: str | None, text: str | None, tokens: int | None, length: int
) -> Any:
    """What measures SAEs through the language model, if it is asked for; checked now."""
    if lm is None and text is None and gguf_file is None:
        return None
    if lm is None or text is None:
        raise ConfigError("predictions are measured with both --lm and --eval-dataset.")
    if tokens is not None and tokens < length:
        raise ConfigError(f"--eval-tokens {tokens} is less than one context of {length}.")
    documents, name, settings = read_documents(text), lm, ActivationSettings(context=length)
    if gguf_file is None and not has_head(name):
        raise ConfigError(f"{name} predicts no next token: leave out --lm and --eval-dataset.")

    def measure(saes: dict[str, SwitchSAE]) -> dict[str, dict[str, Any]]:
        model, tokenizer = load_lm(name, "auto", None, gguf_file=gguf_file)
        device = next(model.parameters()).device
        for sae in saes.values():
            torch.nn.Module.to(sae, device)
        return evaluate(saes, model, documents, tokenizer, settings, max_tokens=tokens, alone=True)

    return measure


def table(found: dict[str, Any]) -> str:
    """Figures of each SAE, one a line, and the claims with what was found."""
    saes = sorted(found["saes"], key=lambda each: float(each["fvu"]))
    columns = [name for name in _COLUMNS if any(name in each for each in saes)]
    rows = [["SAE", "kFLOPs/token", "parameters", "tokens", *columns]]
    rows += [
        [
            each["name"],
            f"{each['flops_per_token']['total'] / 1000:,.0f}",
            f"{each['parameters']:,}",
            f"{each['train_tokens']:,}" if each["train_tokens"] else "?",
            *(f"{each[name]:.4g}" if name in each else "" for name in columns),
        ]
        for each in saes
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            word.ljust(width) if at == 0 else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for claim in found["claims"]:
        lines += ["", f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}"]
        lines += [f"  {part}" for part in claim["sentence"].split("; ")]
    return "\n".join(lines)


def _told(context: typer.Context) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The runs' arguments, the SAEs' fields, and the seeds."""
    pairs = pairs_of(context.args, "CACHE comes first, and is one")
    words = pairs.pop("seed", ["0"])
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seed takes whole numbers, not {' '.join(words)!r}.")
    run, of_sae, rows, _ = split_options(pairs, set())
    if rows or {"output_dir", "hookpoint"} & pairs.keys():
        name = next(iter(rows), "output_dir")
        raise ConfigError(f"--{name} has no meaning here: the rows are the cache's. See --help.")
    typed_run, typed_sae = (
        {name: typed(name, value) for name, value in part.items()} for part in (run, of_sae)
    )
    return typed_run, typed_sae, [int(word) for word in words]
