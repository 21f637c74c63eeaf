"""Attach SAEs to a running model, see what is attached, and take it off.

Room   (model, SAEs, places) -> checked -> a `Session`, whose hooks `board.py` places.
Beware Everything is checked before the model is touched. Device and dtype come from the stream,
       never from a block's weights, which may be on `meta` under accelerate.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import overload

from torch import nn

from hf_switch_sae.errors import AttachError, HookpointError, WidthError
from hf_switch_sae.lm.config import config_of, text_config
from hf_switch_sae.lm.fingerprint import check_base_model
from hf_switch_sae.lm.hookpoints import (
    Hookpoint,
    resolve,
    unwrap,
)
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.board import LOCK, open_session
from hf_switch_sae.sessions.place import sessions_of
from hf_switch_sae.sessions.session import (
    AttachedSAE,
    Session,
    SessionOfOne,
    SessionOfSeveral,
)
from hf_switch_sae.sessions.tap import Tap

ByPlace = Mapping[int, SwitchSAE] | Mapping[str, SwitchSAE] | Mapping[int | str, SwitchSAE]
"""SAEs by layer, hookpoint or module path."""


@overload
def attach(
    lm: nn.Module,
    saes: SwitchSAE,
    at: int | str | None = None,
    *,
    splice: bool = False,
    allow_mismatch: bool = False,
    all_threads: bool | None = None,
) -> SessionOfOne: ...


@overload
def attach(
    lm: nn.Module,
    saes: ByPlace,
    at: int | str | None = None,
    *,
    splice: bool = False,
    allow_mismatch: bool = False,
    all_threads: bool | None = None,
) -> SessionOfSeveral: ...


def attach(
    lm: nn.Module,
    saes: SwitchSAE | ByPlace,
    at: int | str | None = None,
    *,
    splice: bool = False,
    allow_mismatch: bool = False,
    all_threads: bool | None = None,
) -> Session:
    """Attach one SAE, or several at once, to a running language model.

    Without edits the model computes bit for bit what it did before. Use it as a context manager, or
    call `detach()`.

    Args:
        lm: any Hugging Face transformer, wrapped (PEFT, DDP, torch.compile, accelerate) or not.
        saes: an SAE, or {place: SAE}.
        at: the place of a single SAE: layer, hookpoint or module path; its own `config.hookpoint`
            by default.
        splice: replace the residual stream by the SAE's reconstruction (edits still apply).
        allow_mismatch: accept another language model than the SAE was trained on.
        all_threads: whether the session also acts in threads that have no session of their own on
            this model; by default if it is opened in the main thread.

    Returns:
        A `Session`. Given one SAE, its `features` and `edits` are that SAE's; given a mapping, they
        are mappings by hookpoint.

    Raises:
        WidthError, BaseModelError, AttachError: the SAE does not fit.
        HookpointError: no such place, or none given.
        EditError: two splices at one place.

    All of them are raised before anything was changed.
    """
    root = _root_of(lm)
    # all that can be refused is, before the model is touched
    taps: dict[str, Tap] = {}
    for sae, place in _places(root, saes, at):
        _check_fit(root, sae, place, allow_mismatch)
        if place.name in taps:
            raise AttachError(
                f"two SAEs are given for {place.name}; open a second session for the second one."
            )
        taps[place.name] = Tap(root, sae, place, splice)
    # a streaming generate runs in a worker thread, and its user expects it to be edited
    if all_threads is None:
        all_threads = threading.current_thread() is threading.main_thread()
    with LOCK:
        kind = SessionOfSeveral if isinstance(saes, Mapping) else SessionOfOne
        session = kind(lm, taps, all_threads)
        open_session(session)
    return session


def status(lm: nn.Module) -> list[AttachedSAE]:
    """Every SAE attached to a model, by all sessions and threads, with its live edits; or [].

    Raises:
        AttachError: `lm` is no module.
    """
    return [line for session in sessions_of(_root_of(lm)) for line in session.status()]


def detach(lm: nn.Module) -> int:
    """Detach every session of a model, such as one whose variable is lost; returns how many.

    Raises:
        AttachError: `lm` is no module.
    """
    sessions = sessions_of(_root_of(lm))
    for session in sessions:
        session.detach()
    return len(sessions)


def _root_of(lm: nn.Module) -> nn.Module:
    if not isinstance(lm, nn.Module):
        raise AttachError(f"a language model is a torch.nn.Module; got {lm!r}.")
    return unwrap(lm)


def _places(
    root: nn.Module, saes: SwitchSAE | ByPlace, at: int | str | None
) -> list[tuple[SwitchSAE, Hookpoint]]:
    # of a compiled or wrapped SAE only its forward is to be trusted
    for sae in saes.values() if isinstance(saes, Mapping) else (saes,):
        if not isinstance(sae, SwitchSAE):
            raise AttachError(
                f"attach takes a SwitchSAE, or {{place: SwitchSAE}}; got {type(sae).__name__}. "
                "Of a compiled or wrapped SAE, pass the SwitchSAE inside."
            )
    if isinstance(saes, Mapping):
        if at is not None:
            raise AttachError(
                "with several SAEs the places are the keys of the mapping; leave `at` out."
            )
        if not saes:
            raise AttachError("no SAE to attach: the mapping is empty.")
        return [(sae, resolve(root, place)) for place, sae in saes.items()]
    where = saes.config.hookpoint if at is None else at
    if where is None:
        raise HookpointError(
            "the SAE's config names no hookpoint: pass at=, e.g. at=15 or at='model.layers.15'."
        )
    return [(saes, resolve(root, where))]


def _check_fit(root: nn.Module, sae: SwitchSAE, place: Hookpoint, allow_mismatch: bool) -> None:
    if not sae.dtype.is_floating_point or sae.dtype.itemsize < 2:
        raise AttachError(
            f"the SAE's weights are {sae.dtype}; load it as float32, bfloat16 or float16."
        )
    # no weights: it would fail at the first forward, in the middle of the model
    if sae.b_dec.device.type == "meta":
        raise AttachError(
            "the SAE has no weights, it is on the meta device: load it with from_pretrained."
        )
    if sae.training and sae.config.activation == "batch_topk":
        raise AttachError(
            "a batch_topk SAE in training mode selects across the batch: call sae.eval() first."
        )
    # where the width can be told now, a wrong one is refused now; else by the tap
    wanted = sae.config.hidden_size
    if (width := _width(place, wanted)) is not None:
        raise WidthError(
            f"the residual stream of {type(root).__name__} at {place.name} is {width} wide; "
            f"the SAE reads {wanted}."
        )
    if not allow_mismatch:
        config = sae.config
        check_base_model(root, config.base_model, config.base_model_fingerprint, place.module)


def _width(place: Hookpoint, wanted: int) -> int | None:
    """The width of a block's stream if it is not `wanted`; None if it may be.

    A block holds norms as wide as its stream. A stream of several lanes is wider than the config
    says, and then a norm is too. If this can't tell, the first forward checks.
    """
    if place.blocks is None or place.module not in place.blocks.blocks:
        return None
    owner = place.blocks.owner
    config = text_config(owner) if place.blocks.decoding else config_of(owner)
    width = getattr(config, "hidden_size", None)
    parameters = place.module.named_parameters()
    # a config of several lanes or towers may tell the width of another part
    norms = {p.shape[0] for name, p in parameters if p.ndim == 1 and name.endswith("weight")}
    return width if width in norms and wanted not in norms else None
