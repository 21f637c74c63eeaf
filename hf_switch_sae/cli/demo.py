"""`hf-switch-sae demo`: read and steer a real language model."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_switch_sae.demo import PROMPT, SAE, run_demo


def demo(
    prompt: Annotated[str, typer.Argument(help="What you say to the model.")] = PROMPT,
    feature: Annotated[
        int | None, typer.Option(help="Feature to steer along, instead of the recipe's.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Steering strength, in units of the feature's maximum.")
    ] = None,
    sae: Annotated[
        str | None, typer.Option(help="Hub id or folder of an SAE of that model; by default ours.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 60,
) -> None:
    """Read a small language model's features, then steer it.

    The model is SmolLM2-135M-Instruct.
    """
    run_demo(sae or SAE, prompt, feature, strength, max_new_tokens)
