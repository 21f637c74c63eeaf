"""`hf-switch-sae compare`: SAEs of one hookpoint, trained and measured on the same rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_switch_sae import plots
from hf_switch_sae.cli.loading import load_sae, split_address
from hf_switch_sae.cli.options import as_typed, pairs_of, split_options, typed
from hf_switch_sae.cli.tables import print_table
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
        Path,
        typer.Option("--held-out", "--held_out", help="Folder of activations to measure on."),
    ],
    to: Annotated[Path, typer.Option(help="Folder of the comparison, new or to continue.")],
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="An SAE to measure as well: a folder or a Hub id, either with :subfolder; repeat "
            "it for several."
        ),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help='An SAE to train, as "num_experts=8 num_features=6144"; repeat it for several.'
        ),
    ] = None,
    named: Annotated[
        str | None, typer.Option("--set", help=f"A set of SAEs to train: {', '.join(SETS)}.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Features of the set's dense SAE.")
    ] = None,
    experts: Annotated[
        int, typer.Option(min=2, help="Experts of the set's SAE with equal operations.")
    ] = 8,
    layer: Annotated[
        str | None, typer.Option(help="Layer or hookpoint, if the caches have several.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="The preset: default, or published (the paper's).")
    ] = "default",
    lm: Annotated[
        str | None,
        typer.Option(help="The language model, to measure what its predictions lose as well."),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            "--eval-dataset", "--eval_dataset", help="Held-out text for these predictions."
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            "--eval-tokens", "--eval_tokens", min=1, help="Most tokens of that text to use."
        ),
    ] = None,
    eval_context: Annotated[
        int,
        typer.Option(
            "--eval-context", "--eval_context", min=1, help="Tokens that the model sees at once."
        ),
    ] = 256,
    gguf_file: Annotated[
        str | None,
        typer.Option(
            "--gguf-file", "--gguf_file", help="A GGUF file in the language model's folder."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device to measure on.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Only say what would be trained.")
    ] = False,
) -> None:
    """Train Switch and dense SAEs alike, and compare them.

    CACHE comes first. All SAEs train on its rows, and are measured on those of --held-out. --to
    gets a subfolder for each SAE that is trained, comparison.json, and figures. An SAE that is
    there already is not trained again, and an interrupted run continues.

    The fields of these classes are options too, for all runs: transformers.TrainingArguments
    (--num_train_tokens, --bf16, ...; --seed takes several) and SwitchSAEConfig (--k, --activation,
    ...). The words of --train are such fields, for one SAE.
    """
    run, of_sae, seeds = _options_of(context)
    # a set needs k, as none of its experts may have fewer features
    in_set = _set(named, width, experts, int(of_sae.get("k") or 32), preset)
    planned = plan([*in_set, *(train or [])], of_sae, run, seeds, preset)
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
        extra_measurements=_predictions(lm, gguf_file, eval_dataset, eval_tokens, eval_context),
    )
    _show(found)

    # the figures of a comparison are worth having even where they can't be drawn
    can_draw = plots.can_draw(lambda sentence: print(sentence, file=sys.stderr))
    figures = plots.draw_comparison(found, to / FIGURES) if can_draw else []
    for file in [to / COMPARISON, *figures]:
        print(file)


def _set(name: str | None, width: int | None, experts: int, k: int, preset: str) -> Sequence[Any]:
    """The SAEs of a set, as `plan` takes them; none if no set is asked for."""
    if name is None:
        if width is not None:
            raise ConfigError(f"--width {width} is of a set: give --set {next(iter(SETS))}.")
        return ()
    if name not in SETS:
        raise ConfigError(f"no set {name!r}; there are {', '.join(SETS)}.")
    if width is None:
        raise ConfigError(f"--set {name} needs a --width; the sets are {', '.join(SETS)}.")
    # the published loss has no L1 term, so ReLU SAEs are left out
    return SETS[name](width, experts, k, preset != "published")


def _load(address: str) -> tuple[str, SwitchSAE]:
    """A short name for an SAE, and the SAE itself, which stays on the CPU for now."""
    whole, subfolder = split_address(address)
    name = "-".join(part for part in (Path(whole).name, subfolder.replace("/", "-")) if part)
    loaded = load_sae(whole, subfolder)
    torch.nn.Module.to(loaded, "cpu")
    return name, loaded


def _predictions(
    lm: str | None, gguf_file: str | None, text: str | None, tokens: int | None, length: int
) -> Any:
    """A function that measures SAEs by the model's predictions; None if nobody asked for it.

    What can be checked is checked now, as it is called after the training.
    """
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
        # only now, as the training needs the memory
        model, tokenizer = load_lm(name, "auto", None, gguf_file=gguf_file)
        device = next(model.parameters()).device
        for sae in saes.values():
            torch.nn.Module.to(sae, device)
        return evaluate(saes, model, documents, tokenizer, settings, max_tokens=tokens, alone=True)

    return measure


def _show(found: dict[str, Any]) -> None:
    """Print a table with a row for each SAE, and what became of each claim."""
    saes = sorted(found["saes"], key=lambda each: float(each["fvu"]))
    # without a language model there is no ce_recovered, without experts no load
    columns = [name for name in _COLUMNS if any(name in each for each in saes)]
    rows = [
        [
            each["name"],
            f"{each['flops_per_token']['total'] / 1000:,.0f}",
            f"{each['parameters']:,}",
            f"{each['train_tokens']:,}" if each["train_tokens"] else "?",
            *(f"{each[name]:.4g}" if name in each else "" for name in columns),
        ]
        for each in saes
    ]
    print_table(rows, ["SAE", "kFLOPs/token", "parameters", "tokens", *columns])
    for claim in found["claims"]:
        print(f"\n{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")
        # a sentence has a part for each pair
        for part in claim["sentence"].split("; "):
            print(f"  {part}")


def _options_of(context: typer.Context) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """The runs' arguments, the SAEs' fields, and the seeds."""
    pairs = pairs_of(context.args, "CACHE comes first, and is one")
    # taken out, as here --seed may have several values
    words = pairs.pop("seed", ["0"])
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seed takes whole numbers, not {' '.join(words)!r}.")
    run, of_sae, rows, _ = split_options(pairs, set())
    foreign = [*rows, *(name for name in ("output_dir", "hookpoint") if name in pairs)]
    if foreign:
        raise ConfigError(
            f"--{foreign[0]} has no meaning here: the rows are the cache's. See --help."
        )
    typed_run, typed_sae = (
        {name: typed(name, value) for name, value in part.items()} for part in (run, of_sae)
    )
    return typed_run, typed_sae, [int(word) for word in words]
