"""Scoped edits seen from outside: which of them reached which tokens, by plain torch hooks.

Room   (model, place, scopes, a call) -> for each time the place ran, scope -> tokens [B, T] bool.
How    Each scope steers along an axis of its own, so that one call tells all of them apart: what a
       session adds to the stream is 1 along the axes of the scopes that apply.
Beware Models write into the stream in place, so it is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helpers.streams import Tokens, arranged
from hf_switch_sae import Steer, SwitchSAE, SwitchSAEConfig, SwitchSAEError, attach

SCOPES: dict[str, dict[str, Any]] = {
    "all": {},
    "prompt": {"positions": "prompt"},
    "generated": {"positions": "generated"},
    "rows=1": {"rows": 1},
    "positions=[0]": {"positions": [0]},
    "positions=[0, 2]": {"positions": [0, 2]},
    "positions=1:7:2": {"positions": slice(1, 7, 2)},
}
Expected = Callable[[int, Tensor], list[Tokens]]
"""(how often the place ran before, a stream's tokens [B, T]) -> readings that are right; [] if none
is, so that the edit has to be refused."""


@dataclass
class Outcome:
    """What became of one scope in one call."""

    refusal: SwitchSAEError | None
    wrong: str | None
    runs: int
    """How often the place ran."""


@dataclass
class _Run:
    applied: list[dict[str, Tensor]]
    """For each time the place ran, scope -> tokens [B, T] that were edited."""
    refusal: SwitchSAEError | None


@dataclass
class Place:
    """A module with a residual stream, and what is known of that."""

    model: nn.Module
    path: str
    kind: str
    width: int

    def outcomes(
        self, scopes: list[str], call: Callable[[], Any], expected: Expected
    ) -> dict[str, Outcome]:
        """Run `call` with all scopes at once; where that is refused, also with each on its own."""
        run = self._run(scopes, call)
        if run.refusal is not None and len(scopes) > 1:
            alone = (self.outcomes([scope], call, expected) for scope in scopes)
            return {name: outcome for each in alone for name, outcome in each.items()}
        wrong = _compared(run, scopes, expected)
        return {scope: Outcome(run.refusal, wrong.get(scope), len(run.applied)) for scope in scopes}

    def _run(self, scopes: list[str], call: Callable[[], Any]) -> _Run:
        edits = [Steer(i, 1.0, unit="raw", **SCOPES[scope]) for i, scope in enumerate(scopes)]
        sae, at, refusal = axes_sae(self.width), f"{self.path}.resid_post", None
        with torch.no_grad(), attach(self.model, sae, at=at) as session:
            session.edit(*edits)
            with watched(self.model.get_submodule(self.path)) as changes:
                try:
                    call()
                except SwitchSAEError as error:
                    refusal = error
        return _Run([_applied(arranged(self.kind, x), scopes) for x in changes], refusal)


def _applied(change: Tensor, scopes: list[str]) -> dict[str, Tensor]:
    applied = {scope: change[..., i].abs() > 0.5 for i, scope in enumerate(scopes)}
    # a change that is none of the edits, however small, is every scope's fault
    edited = torch.stack(list(applied.values())).any(0)
    stray = (change != 0).any(-1) & ~edited
    return {scope: tokens | stray for scope, tokens in applied.items()}


def _compared(run: _Run, scopes: list[str], expected: Expected) -> dict[str, str]:
    """Scope -> what is wrong with it, in all that ran before a refusal."""
    best: dict[str, str] = {}
    count = len(expected(0, next(iter(run.applied[0].values())))) if run.applied else 1
    for reading in range(max(1, count)):
        wrong: dict[str, str] = {}
        for index, applied in enumerate(run.applied):
            tokens = expected(index, applied[scopes[0]])
            for scope in scopes:
                got = applied[scope]
                if tokens:
                    want = tokens[reading].within(scope, SCOPES[scope].get("positions"))
                else:  # nothing is known, so that nothing may be edited
                    want = torch.zeros_like(got)
                if not torch.equal(got[:, : want.shape[1]], want):
                    wrong.setdefault(scope, f"run {index}: edited {shown(got)}, not {shown(want)}")
        if not wrong:
            return {}
        best = wrong if not best or len(wrong) < len(best) else best
    return best


def shown(tokens: Tensor) -> str:
    """[B, T] bool as one string a row, shortened."""
    rows = ["".join(".x"[int(token)] for token in row) for row in tokens]
    return " ".join(f"{row[:24]}~{len(row)}" if len(row) > 48 else row for row in rows)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the changes that hooks there now make to a module's output, one a call."""
    before, changes = [], []
    handles = (
        module.register_forward_hook(
            lambda _, __, out: before.append(first(out).clone()), prepend=True
        ),
        module.register_forward_hook(
            lambda _, __, out: changes.append(first(out).clone() - before.pop())
        ),
    )
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def first(value: Any) -> Tensor:
    """The first tensor in a module's output."""
    while not isinstance(value, Tensor):
        value = value[0] if isinstance(value, tuple | list) else next(iter(value.values()))
    return value


def axes_sae(width: int) -> SwitchSAE:
    """An SAE whose feature i is the i-th axis of the stream."""
    config = SwitchSAEConfig(hidden_size=width, num_features=8, num_experts=2, k=2)
    sae = SwitchSAE(config).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(8, width).view_as(sae.W_dec))
    return sae
