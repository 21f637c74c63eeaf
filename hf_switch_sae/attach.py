"""SAEs onto a running model: the only room that registers hooks and removes every trace of them.

One hook a place, shared by all sessions: each tap sees the residual stream as it arrived, and what
the taps want added is added once. So the order in which sessions were opened does not matter.
Beside the places, the module that owns the blocks gets a hook that notes its arguments (for
positions), and `generate` of this one model object is shadowed by a function that notes what it was
given; both go with the last session.

Beware transformers records hidden states through hooks of its own: ours are prepended, or their
       edit would be missing there. Dynamo does not look for new hooks on code it has compiled:
       adding one resets it. Hooks take device and dtype from the stream, never from a block's
       weights, which may be on `meta` under accelerate.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from hf_switch_sae.base_model import check_base_model
from hf_switch_sae.deltas import PreparedEdits
from hf_switch_sae.edits import check_conflicts
from hf_switch_sae.errors import AttachError, HookpointError, WidthError
from hf_switch_sae.hookpoints import (
    Hookpoint,
    resolve,
    unwrap,
)
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.positions import Call, Generation, Tokens
from hf_switch_sae.session import AttachedSAE, Session, Tap, check_splices
from hf_switch_sae.streams import (
    Layout,
    read_residual,
    read_residual_input,
    replace_residual,
    replace_residual_input,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_BOARD = "_hf_switch_sae_board"
_SEQUENCE_FIRST = {"xlnet", "fsmt"}  # their residual stream is [seq, batch, d]
_DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_LOCK = threading.RLock()  # over all models: a board comes with its first session and goes after it


class ResidualHandle:
    """Removes a hook that `hook_residual` placed."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Remove the hook; doing it twice does nothing."""
        self._handle.remove()

    def __enter__(self) -> ResidualHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hook_residual(
    model: nn.Module, at: int | str, fn: Callable[[Tensor], Tensor | None], *, last: bool = False
) -> ResidualHandle:
    """Call `fn` on the residual stream at a place, each time it comes by; for your own probes.

    Args:
        model: any Hugging Face transformer, wrapped or not.
        at: a layer, a hookpoint (`layers.7.resid_post`, `layers.7.resid_pre`) or a module path.
        fn: gets the residual stream, mostly [batch, seq, hidden_size] (see `find_residual_blocks`
            for the exceptions); returns the tensor to go on with, or None to leave it as it is.
        last: after all other hooks there, those of sessions included, instead of before them.

    Returns:
        A handle with `remove()`, also a context manager.

    Raises:
        HookpointError: no such place.
    """
    place = resolve(model, at)
    _forget_compiled_code()
    return _hook_place(place, fn, last)


def _hook_place(
    place: Hookpoint, fn: Callable[[Tensor], Tensor | None], last: bool = False
) -> ResidualHandle:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(read_residual_input(args, kwargs))
        return None if new is None else replace_residual_input(args, kwargs, new)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = fn(read_residual(output))
        return None if new is None else replace_residual(output, new)

    if place.site == "resid_pre":
        return ResidualHandle(
            place.module.register_forward_pre_hook(before, prepend=not last, with_kwargs=True)
        )
    return ResidualHandle(place.module.register_forward_hook(after, prepend=not last))


def attach(
    lm: nn.Module,
    saes: SwitchSAE | Mapping[int | str, SwitchSAE],
    at: int | str | None = None,
    *,
    splice: bool = False,
    allow_mismatch: bool = False,
    all_threads: bool | None = None,
) -> Session:
    """Attach one SAE, or several at once, to a running language model.

    Without edits the model computes bit for bit what it did before. Use it as a context manager, or
    call `detach()`. Attach before `generate` is called, not from within it: a call under way is not
    known, so `positions="generated"` and `rows=` would not apply to it.

    Args:
        lm: any Hugging Face transformer, wrapped (PEFT, DDP, torch.compile, accelerate) or not.
        saes: an SAE, or {place: SAE}.
        at: the place of a single SAE: layer, hookpoint or module path; its own `config.hookpoint`
            by default.
        splice: replace the residual stream by the SAE's reconstruction (edits still apply).
        allow_mismatch: accept another language model than the SAE was trained on.
        all_threads: whether the session also acts in threads without a session of their own on this
            model; by default if it is opened in the main thread.

    Raises:
        WidthError, BaseModelError, AttachError: the SAE does not fit.
        HookpointError: no such place, or none given.
        EditError: two splices at one place.

    All of them are raised before anything was changed.
    """
    root = _root_of(lm)
    taps: dict[str, Tap] = {}
    for sae, place in _places(root, saes, at):
        _check_fit(root, sae, place, allow_mismatch)
        if place.name in taps:
            raise AttachError(
                f"two SAEs are given for {place.name}; open a second session for the second one."
            )
        taps[place.name] = Tap(sae, place, splice)
    if all_threads is None:
        all_threads = threading.current_thread() is threading.main_thread()
    with _LOCK:
        board = root.__dict__.get(_BOARD) or _Board(root)
        return board.open(lm, taps, all_threads)


def status(lm: nn.Module) -> list[AttachedSAE]:
    """Every SAE attached to a model, by all sessions and threads, with its live edits; or [].

    Raises:
        AttachError: `lm` is no module.
    """
    board = _root_of(lm).__dict__.get(_BOARD)
    return (
        [] if board is None else [line for session in board.sessions for line in session.status()]
    )


def detach(lm: nn.Module) -> int:
    """Detach every session of a model, such as one whose variable is lost; returns how many.

    Raises:
        AttachError: `lm` is no module.
    """
    board = _root_of(lm).__dict__.get(_BOARD)
    sessions = () if board is None else board.sessions
    for session in sessions:
        session.detach()
    return len(sessions)


def _root_of(lm: nn.Module) -> nn.Module:
    if not isinstance(lm, nn.Module):
        raise AttachError(f"a language model is a torch.nn.Module; got {lm!r}.")
    return unwrap(lm)


def _places(
    root: nn.Module, saes: SwitchSAE | Mapping[int | str, SwitchSAE], at: int | str | None
) -> list[tuple[SwitchSAE, Hookpoint]]:
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
    if sae.b_dec.device.type == "meta":
        raise AttachError(
            "the SAE has no weights, it is on the meta device: load it with from_pretrained."
        )
    if sae.training and sae.config.activation == "batch_topk":
        raise AttachError(
            "a batch_topk SAE in training mode selects across the batch: call sae.eval() first."
        )
    wanted = sae.config.hidden_size
    if (width := _width(place, wanted)) is not None:
        raise WidthError(
            f"the residual stream of {type(root).__name__} at {place.name} is {width} wide; "
            f"the SAE reads {wanted}."
        )
    if not allow_mismatch:
        check_base_model(root, sae.config.base_model, sae.config.base_model_fingerprint)


def _width(place: Hookpoint, wanted: int) -> int | None:
    """The width of a block's stream if it can't be `wanted`; None if it can, or a forward tells.

    Blocks of one stream hold norms of its width. A stream of several lanes is wider than its config
    says, and then so is a norm.
    """
    if place.blocks is None or place.module not in place.blocks.blocks:
        return None
    config: Any = getattr(place.blocks.owner, "config", None)
    if place.blocks.decoding and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    parameters = place.module.named_parameters()
    norms = {p.shape[0] for name, p in parameters if p.ndim == 1 and name.endswith("weight")}
    return width if width in norms and wanted not in norms else None


class _Board:
    """All that is attached to one model: places, sessions, and each thread's call under way."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.sessions: tuple[Session, ...] = ()  # replaced, as other threads may be reading it
        self.flow = _Flow()
        self._places: dict[tuple[int, str], _Place] = {}
        self._owners: dict[int, _Owner] = {}
        self._generate: Any = None

    def __reduce__(self) -> NoReturn:
        raise AttachError(
            "an SAE is attached to this model, and its hooks can't go with a copy: detach it "
            "before you copy or pickle the model."
        )

    def open(self, lm: nn.Module, taps: Mapping[str, Tap], all_threads: bool) -> Session:
        session = _BoardSession(self, lm, taps, all_threads)
        for tap in taps.values():
            check_splices([other for _, other in self.taps_at(tap.place)], tap)
        _forget_compiled_code()
        try:
            setattr(self.root, _BOARD, self)
            self._watch_generate()
            for tap in taps.values():
                self._watch_place(tap.place)
            self.sessions = (*self.sessions, session)
        except BaseException:
            self._release()
            raise
        return session

    def close(self, session: Session) -> None:
        with _LOCK:
            self.sessions = tuple(other for other in self.sessions if other is not session)
            self._release()

    def _release(self) -> None:
        """Remove every hook that no session needs any more."""
        used = {_key(tap.place) for session in self.sessions for tap in session.taps.values()}
        for key in [key for key in self._places if key not in used]:
            self._places.pop(key).handle.remove()
        for place in self._places.values():
            place.forget()
        owners = {
            id(owner) for place in self._places.values() for owner in self._owners_of(place.place)
        }
        for owner in [owner for owner in self._owners if owner not in owners]:
            self._owners.pop(owner).remove()
        if not self.sessions:
            self._unwatch_generate()
            self.root.__dict__.pop(_BOARD, None)

    def _watch_place(self, place: Hookpoint) -> None:
        if _key(place) not in self._places:
            self._places[_key(place)] = _Place(self, place)
        for owner in self._owners_of(place):
            if id(owner) not in self._owners:
                self._owners[id(owner)] = _Owner(owner, self.flow, is_root=owner is self.root)

    def _owners_of(self, place: Hookpoint) -> list[nn.Module]:
        owner = self.root if place.blocks is None else place.blocks.owner
        return [self.root] if owner is self.root else [self.root, owner]

    def _watch_generate(self) -> None:
        generate = getattr(self.root, "generate", None)
        if self._generate is not None or not callable(generate):
            return
        flow = self.flow

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if flow.generation is not None:  # a draft within this call: the user's is known already
                return generate(*args, **kwargs)
            self._check_recording(args, kwargs)
            flow.generation = _generation(self.root, args, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                flow.generation = None

        self._generate = (watched, self.root.__dict__.get("generate"))
        self.root.__dict__["generate"] = watched

    def _check_recording(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """AttachError if beams are asked for while a session records: rows would change texts."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or getattr(self.root, "generation_config", None)
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        taps = [tap for session in self.sessions for tap in session.taps.values()]
        if beams > 1 and any(tap.recorder is not None for tap in taps):
            raise AttachError(
                f"generate with num_beams={beams} can't be recorded, as beams move from row to "
                "row: generate first, then record a plain forward of the texts."
            )

    def _unwatch_generate(self) -> None:
        if self._generate is None:
            return
        watched, before = self._generate
        if self.root.__dict__.get("generate") is watched:
            del self.root.__dict__["generate"]
            if before is not None:
                self.root.__dict__["generate"] = before
        self._generate = None

    def taps_at(self, place: Hookpoint) -> list[tuple[Session, Tap]]:
        """Taps of all sessions at a place."""
        taps = ((session, tap) for session in self.sessions for tap in session.taps.values())
        return [(session, tap) for session, tap in taps if _key(tap.place) == _key(place)]


def _changed(x: Tensor, changes: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """A stream with all changes made; what none of them edits stays bit for bit."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    deltas = [delta.to(x.device, dtype) for delta, _ in changes]
    total = deltas[0]
    for delta in deltas[1:]:  # summed before the stream is added, so that order is no matter
        total = total + delta
    new, edited = (x + total).to(x.dtype), None
    for _, where in changes:
        if where is None:
            return new
        edited = where if edited is None else edited | where
    assert edited is not None
    return torch.where(edited[..., None], new, x)


class _BoardSession(Session):
    """A session that knows its neighbours."""

    def __init__(
        self, board: _Board, lm: nn.Module, taps: Mapping[str, Tap], all_threads: bool
    ) -> None:
        super().__init__(lm, taps, all_threads, board.close)
        self._board = board

    def check_with_others(self, tap: Tap, prepared: PreparedEdits) -> None:
        for other_session, other in self._board.taps_at(tap.place):
            together = other_session.thread is self.thread or (
                other_session.all_threads and self.all_threads
            )
            if other is not tap and other.sae is tap.sae and together:
                check_conflicts([*other.edits.edits, *prepared.edits])

    @contextmanager
    def without_edits(self) -> Iterator[None]:
        self._board.flow.read_only = True
        try:
            yield
        finally:
            self._board.flow.read_only = False


class _Place:
    """The one hook at a place.

    It runs at every token, mostly with nothing of its own in a cache: what does not change from
    call to call is looked up once.
    """

    def __init__(self, board: _Board, place: Hookpoint) -> None:
        self.place = place
        self._board, self._flow = board, board.flow
        root, blocks = board.root, place.blocks
        owner: Any = root if blocks is None else blocks.owner
        self._decoding = blocks is None or blocks.decoding
        self._of_text = blocks is not None and blocks.decoding
        kind = getattr(getattr(owner, "config", None), "model_type", None)
        self._sequence_first = kind in _SEQUENCE_FIRST
        self._owner, self._root = id(owner), id(root)
        self._is_pair = bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))
        self._known: tuple[tuple[Session, ...], threading.Thread, list[Tap]] | None = None
        # Not traced: which taps there are and what they change is read anew at every call.
        self.handle = _hook_place(place, _untraced(self.pass_by))

    def pass_by(self, stream: Tensor) -> Tensor | None:
        """Show a stream to the taps at a place; the new stream, or None if nobody changes it."""
        taps = self._acting()
        if not taps:
            return None
        if not stream.is_floating_point():
            raise HookpointError(
                f"what {self.place.path} returns is {stream.dtype}, not a residual stream."
            )
        layout = Layout(stream, taps[0].width, self._sequence_first, self._of_text)
        x, flow = layout.rows, self._flow
        call = self._call() if layout.has_rows else None
        generation = None if call is None else flow.generation
        tokens = Tokens(x, call, generation, self._decoding, layout.lanes)
        changes = [tap.pass_by(x, tokens, flow.read_only) for tap in taps]
        if not flow.read_only:
            for tap in taps:
                tap.record_last(None if call is None else call.token_ids)
        wanted = [change for change in changes if change is not None]
        return layout.restore(_changed(x, wanted)) if wanted else None

    def forget(self) -> None:
        """Hold on to no session that may have been closed."""
        self._known = None

    def _acting(self) -> list[Tap]:
        """Taps of the sessions that act in this thread."""
        sessions, thread = self._board.sessions, threading.current_thread()
        known = self._known
        if known is not None and known[0] is sessions and known[1] is thread:
            return known[2]
        own = tuple(session for session in sessions if session.thread is thread)
        acting = own or tuple(session for session in sessions if session.all_threads)
        here = _key(self.place)
        taps = [t for session in acting for t in session.taps.values() if _key(t.place) == here]
        self._known = sessions, thread, taps
        return taps

    def _call(self) -> Call | None:
        """The owner's call; with the whole model's mask where only that one is still 2-D."""
        calls = self._flow.calls
        call, outer = calls.get(self._owner), calls.get(self._root)
        if call is None or outer is None or not self._decoding:
            return call
        if call.token_ids is None:  # a multimodal model embeds them before its text model runs
            call = replace(call, token_ids=outer.token_ids)
        mask = outer.decoder_mask if self._is_pair else outer.mask
        if (
            isinstance(mask, Tensor)
            and mask.ndim == 2
            and not (isinstance(call.mask, Tensor) and call.mask.ndim == 2)
        ):
            return replace(call, mask=mask)
        return call


class _Flow(threading.local):
    """What the calls under way in this thread were given."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.generation: Generation | None = None
        self.read_only = False


class _Owner:
    """Notes what a module that owns blocks is called with, while it runs."""

    def __init__(self, module: nn.Module, flow: _Flow, is_root: bool) -> None:
        parameters = inspect.signature(type(module).forward).parameters
        names = [name for name in parameters if name != "self"]

        @_untraced
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            flow.calls[id(module)] = Call.read({**dict(zip(names, args, strict=False)), **kwargs})

        @_untraced
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = flow.calls.pop(id(module), None)
            if is_root and call is not None and flow.generation is not None:
                flow.generation.seen += call.length

        self._handles = (
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _generation(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """What `generate` was given: rows, and the prompt's columns where they can be told before."""
    given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    # A row of a text may have several images, or parts of them, so what is text comes first.
    named = [given.get(name) for name in ("inputs_embeds", "input_ids", "inputs", "attention_mask")]
    encoded = (given.get("encoder_outputs") or [None])[0]
    candidates = (*named, encoded, *given.values())
    tensors = [value for value in candidates if isinstance(value, Tensor) and value.ndim >= 2]
    rows = tensors[0].shape[0] if tensors else None
    is_pair = bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))
    names = ("decoder_input_ids",) if is_pair else ("inputs_embeds", "input_ids", "inputs")
    prompt = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    is_text = prompt is not None and (
        prompt.ndim == 2 or (prompt.ndim == 3 and prompt is given.get("inputs_embeds"))
    )
    columns = prompt.shape[1] if is_text and prompt is not None else None
    defaults = given.get("generation_config") or getattr(root, "generation_config", None)
    options = (given, vars(defaults) if defaults is not None else {})
    drafted = any(each.get(name) for each in options for name in _DRAFTS)
    if is_pair:  # `generate` may put a start token in front, which the first forward shows
        columns = 1 if drafted and prompt is None else None
    return Generation(rows=rows, columns=columns, drafted=drafted)


def _key(place: Hookpoint) -> tuple[int, str]:
    return id(place.module), place.site


def _forget_compiled_code() -> None:
    """Make Dynamo trace compiled code again: it does not guard on hooks, so it misses new ones."""
    if "torch._dynamo" in sys.modules and any(torch._dynamo.utils.counters["frames"].values()):
        torch.compiler.reset()


def _untraced(fn: _Function) -> _Function:
    """`fn`, which torch.compile calls as it is."""
    return cast(_Function, torch.compiler.disable(fn))  # type: ignore[no-untyped-call]


SwitchSAE._open_session = staticmethod(attach)
