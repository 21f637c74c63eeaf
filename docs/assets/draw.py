"""Draws docs/assets/features.svg: what a real model reads in a sentence, and what steering changes.

    python docs/assets/draw.py

Every word in the picture is the demo's language model's own; the words for features are those of
the released SAE's features.json.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import torch

from hf_switch_sae import Steer, SwitchSAE
from hf_switch_sae.demo import SAE, load_demo_lm

TEXT = "After the battle, the ship sailed home across the sea with two hundred soldiers on board."
SHOWN = {786: "#0b7285", 1136: "#c92a2a", 3572: "#5f3dc4"}
PROMPT = "My plans for the weekend:"
STEERED = {
    "no edits": (),
    "Steer(786, 0.7)": (Steer(786, 0.7),),
    "Steer(905, 0.7)": (Steer(905, 0.7),),
}
WIDTH, CHARACTER, LINE = 880, 8.4, 26  # of monospace at 14 pixels


def text_at(x: float, y: float, text: str, **style: str) -> str:
    shown = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    length = f' textLength="{CHARACTER * len(text):.1f}"' if "font_family" not in style else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}"{length} xml:space="preserve"{shown}>{escape(text)}</text>'
    )


def tokens_with_acts() -> tuple[list[tuple[str, dict[int, float]]], list[tuple[str, str]]]:
    """Each token with its shares of the shown features' maxima; each edit with what it made."""
    lm, tokenizer = load_demo_lm()
    sae = SwitchSAE.from_pretrained(SAE)
    inputs = tokenizer(tokenizer.eos_token + TEXT, return_tensors="pt")
    with sae.attach(lm) as session, torch.no_grad():
        lm(**inputs)
        acts = session.features[0].select(list(SHOWN)) / sae.feature_max[list(SHOWN)]
        made = []
        for name, edits in STEERED.items():
            session.edit(*edits)
            prompt = tokenizer(PROMPT, return_tensors="pt")
            out = lm.generate(**prompt, max_new_tokens=22, do_sample=False, pad_token_id=0)
            new = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
            made.append((name, new.strip().splitlines()[0].removeprefix("* ")))
    words = [tokenizer.decode(int(each)) for each in inputs["input_ids"][0]]
    shares = [dict(zip(SHOWN, row, strict=True)) for row in acts.tolist()]
    return list(zip(words, shares, strict=True))[1:], made


def picture() -> str:
    tokens, made = tokens_with_acts()
    names = json.loads((SAE / "features.json").read_text(encoding="utf-8"))
    parts, x, y = [], 24.0, 62.0
    small = {"font_family": "sans-serif", "font_size": "12", "fill": "#666666"}
    parts.append(text_at(24, 30, "Which features are active, token by token (layer 15)", **small))
    for token, shares in tokens:
        width = CHARACTER * len(token)
        if x + width > WIDTH - 24:
            x, y = 24.0, y + LINE
            token = token.lstrip()
        feature, share = max(shares.items(), key=lambda each: each[1])
        if share > 0:
            word = token.lstrip()
            left = x + CHARACTER * (len(token) - len(word)) - 2
            parts.append(
                f'<rect x="{left:.1f}" y="{y - 16:.1f}" width="{CHARACTER * len(word) + 4:.1f}" '
                f'height="22" rx="3" fill="{SHOWN[feature]}" fill-opacity="{share * 0.6:.2f}"/>'
            )
        parts.append(text_at(x, y, token, fill="#212529"))
        x += CHARACTER * len(token)
    y, x = y + 36, 24.0
    for feature, color in SHOWN.items():
        label = f"{feature}: {', '.join(names[str(feature)][:3])}"
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="2" fill="{color}"/>')
        parts.append(text_at(x + 18, y, label, **small))
        x += 40 + 6.6 * len(label)
    y += 44
    parts.append(text_at(24, y, f"How the model goes on from: {PROMPT}", **small))
    for name, said in made:
        y += LINE
        parts.append(text_at(24, y, name, fill="#666666"))
        parts.append(text_at(180, y, said, fill="#212529"))
    height = y + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" font-family="monospace" font-size="14">\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("features.svg").write_text(picture(), encoding="utf-8")
