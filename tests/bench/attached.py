"""An SAE attached to a language model while it generates: what its hooks cost a token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_switch_sae import Clamp, Steer, SwitchSAE

from .peers import installed
from .timing import K, Table, ms, seconds, stream_of, switch_sae


class Stopwatch:
    """Seconds spent between what it hooks first and last on some modules: in the hooks between."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.spent, self._start, self._handles = 0.0, 0.0, []
        self._modules = modules

    def around(self) -> None:
        """The hooks that stand outside of those registered since `before`."""
        for module in self._modules:
            first = module.register_forward_pre_hook(lambda *_: self._go(), prepend=True)
            last = module.register_forward_pre_hook(lambda *_: self._stop())
            front = module.register_forward_hook(lambda *_: self._go(), prepend=True)
            back = module.register_forward_hook(lambda *_: self._stop())
            self._handles += [first, last, front, back]

    def _go(self) -> None:
        self._start = time.perf_counter()

    def _stop(self) -> None:
        self.spent += time.perf_counter() - self._start

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def attached(lm: Any, layer: nn.Module, kind: str, sae: Any, peers: dict[str, Any]) -> Iterator:
    """The model with something at a layer: nothing, a hook, a peer, or our SAE doing its work."""
    handles = []
    try:
        if kind in peers:
            handles.append(
                layer.register_forward_hook(
                    lambda module, args, out: (peers[kind].forward(stream_of(out)[0]), None)[1]
                )
            )
        elif kind == "no-op hook":
            handles.append(layer.register_forward_hook(lambda module, args, out: None))
        elif kind != "bare":
            session = sae.attach(lm, at=15)
            handles.append(session)
            if "read" in kind:
                handles.append(layer.register_forward_hook(lambda *_: (session.features, None)[1]))
            elif "Steer" in kind:
                session.edit(Steer(5, 0.5))
            elif "Clamp" in kind:
                session.edit(Clamp(5, 0.5))
        yield
    finally:
        for handle in reversed(handles):
            getattr(handle, "remove", None) and handle.remove()
            getattr(handle, "detach", None) and handle.detach()


def attach_table() -> Table:
    """A 135-million-parameter model generates with an SAE at its middle layer, batch 1."""
    from hf_switch_sae.demo import load_demo_lm

    lm, tokenizer = load_demo_lm()
    d, layer, tokens = lm.config.hidden_size, lm.model.layers[15], 40
    prompt = tokenizer("The ship sailed across the sea to the old harbour.", return_tensors="pt")
    rows: Table = [("attached", "in the hooks, ms a token", "share of a bare token",
                    "generate, against no-op hook (min to max)")]  # fmt: skip
    sizes = [("65,536 features, 64 experts", switch_sae(64, 65_536, d)),
             ("1,048,576 features, 512 experts, bf16",
              switch_sae(512, 1_048_576, d).to(torch.bfloat16))]  # fmt: skip
    for size, sae in sizes:
        sae.feature_max.fill_(1.0)
        sae.residual_norm.fill_(100.0)
        sae.statistics_tokens.fill_(1)
        small = sae.config.num_features < 10**5
        peers = installed(d, sae.config.num_features, K)[0] if small else {}
        peers.pop("dense masked", None)
        ours = ["ours, attached", "ours, features read", "ours, Steer", "ours, Clamp"]
        kinds = ["bare", "no-op hook", *ours, *peers]
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        inside: dict[str, list[float]] = {kind: [] for kind in kinds}

        def run(kind: str, sae: SwitchSAE = sae, peers: dict[str, Any] = peers) -> None:
            lm.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                        pad_token_id=0)  # fmt: skip

        for turn in range(8):
            for kind in kinds:
                with attached(lm, layer, kind, sae, peers), torch.no_grad():
                    taken = seconds(lambda kind=kind: run(kind)) / tokens
                watch = Stopwatch([lm, lm.model, layer])
                with attached(lm, layer, kind, sae, peers), torch.no_grad():
                    watch.around()
                    seconds(lambda kind=kind: run(kind))
                    watch.remove()
                if turn:
                    whole[kind].append(taken)
                    inside[kind].append(watch.spent / tokens)
        empty = statistics.median(inside["bare"])  # what the stopwatch itself takes
        token = statistics.median(whole["bare"])
        rows.append((f"**{size}**; a bare token: {ms(token)} ms", "", "", ""))
        for kind in kinds[2:]:
            spent = statistics.median(inside[kind]) - empty
            ratios = [a / b for a, b in zip(whole[kind], whole["no-op hook"], strict=True)]
            rows.append((kind, ms(spent), f"{100 * spent / token:.2f} %",
                         f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to "
                         f"{max(ratios):.3f})"))  # fmt: skip
        noise = [a / b for a, b in zip(whole["bare"], whole["no-op hook"], strict=True)]
        rows.append(("bare", "0", "0 %", f"{statistics.median(noise):.3f} "
                     f"({min(noise):.3f} to {max(noise):.3f})"))  # fmt: skip
    return rows
