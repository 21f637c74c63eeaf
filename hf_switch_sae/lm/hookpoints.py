"""Where an SAE reads and writes: from a name to a block of any Hugging Face model.

Room   (model, "layers.7.resid_post" | 7 | module path) -> Hookpoint. Nothing is hooked here; that
       is `hooks.py`.
How    Every outermost list of blocks in the module tree is a candidate. Blocks that transformers
       records as hidden states, or as many of them as the config has layers, come first; then
       those of the text model; then those that `generate` decodes with. A tie is an error.
Beware `hidden_states[i]` of transformers is mostly `layers.<i>.resid_pre`, but its last entry comes
       after the final norm, so it is not the last block's resid_post; and some models add to the
       stream between blocks, so `layers.<i+1>.resid_pre` is no alias of `layers.<i>.resid_post`.
"""

import difflib
import operator
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

from torch import nn
from transformers import PreTrainedModel

from hf_switch_sae.errors import HookpointError
from hf_switch_sae.lm.names import SITES, Site, hookpoint_of

# Every name under which a config of transformers says how many blocks a stack has.
_DEPTHS = """num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers
num_encoder_layers num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers"""

# Models without a block that can be hooked, by the model_type of the stack's owner: why, and the
# module whose output is the layer's. The module tree does not tell; the model zoo found them.
_NO_BLOCKS = {
    "xlm": ("its layers are parallel lists of parts", "layer_norm2.<i>"),
    "flaubert": (
        "its layers are parallel lists of parts (and with pre_norm only the input of the next "
        "layer's norm, layer_norm1.<i + 1>.resid_pre, is the stream)",
        "layer_norm2.<i>",
    ),
    "squeezebert": (
        "its encoder calls layer.forward, so a hook on a layer never fires (and the stream is "
        "[batch, hidden_size, seq])",
        "encoder.layers.<i>.output",
    ),
}
_NEVER_FIRE = {"squeezebert"}

_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
}
_MODULE_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# In the order to try: LoRA and its kin put two modules before the model, prompt learning one.
_PEFT_PREFIXES = (
    r"^((module|_orig_mod)\.)*base_model\.model\.",
    r"^((module|_orig_mod)\.)*base_model\.",
)


@dataclass(frozen=True)
class ResidualBlocks:
    """A stack of blocks, all of which write to one residual stream."""

    path: str
    """Module path of the list in the unwrapped model; of the outer one for a list of lists."""
    blocks: tuple[nn.Module, ...] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False)
    """Module path of each block."""
    owner: nn.Module = field(repr=False)
    """Innermost PreTrainedModel around the stack: its forward gets this stack's attention_mask."""
    owner_path: str
    decoding: bool
    """Whether it lies in what `generate` decodes with, or is the one stack of any other model.

    False for the encoder of an encoder-decoder and for a vision or audio tower.
    """

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Hookpoint:
    """A module, and which side of it is read and written."""

    name: str
    """`layers.<i>.resid_post` in the default stack, else `<module path>.resid_post`."""
    path: str
    module: nn.Module = field(repr=False)
    site: Site
    layer: int | None
    """Index of the block that it is, or lies in; None outside every stack."""
    blocks: ResidualBlocks | None


@dataclass(frozen=True)
class _Stack:
    public: ResidualBlocks
    container: nn.Module
    rank: tuple[bool, ...]

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in self.public.blocks))
        return f"{self.public.path} ({len(self.public)} x {kinds})"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, PEFT, DataParallel, DDP, FSDP1 and DeepSpeed wrappers."""
    while (inner := _inside_wrapper(model)) is not None:
        model = inner
    return model


def language_model(model: nn.Module, module: nn.Module | None = None) -> nn.Module:
    """The model of transformers inside, whatever module it is a part of.

    Args:
        model: any module; without a model of transformers inside, it is returned unwrapped.
        module: one within the model that is meant, if there may be several.
    """
    root = unwrap(model)
    held = dict(_outermost(root))
    if len(held) < 2:
        return next(iter(held.values()), root)
    if module is None:
        with suppress(HookpointError):
            module = find_residual_blocks(root).blocks[0]
    around = (each for each in held.values() if any(part is module for part in each.modules()))
    return next(around, next(iter(held.values())))


def _outermost(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, PreTrainedModel):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{path}.{name}")


def find_residual_blocks(model: nn.Module, at: str | None = None) -> ResidualBlocks:
    """The stack of blocks that carries the model's residual stream.

    Args:
        model: any model of transformers, wrapped or not, or any module with a list of blocks.
        at: module path of another stack, or of a module within or around it, such as
            "model.visual.blocks" or "encoder.layer.3.output"; a list of modules is always taken.

    Raises:
        HookpointError: no stack, several that fit equally well, or blocks that cannot be hooked.
    """
    root = unwrap(model)
    stacks = _stacks(root)
    if at is None:
        return _best(stacks, root)
    path, module = _find(root, at, stacks)
    if chosen := [stack for stack in stacks if stack.container is module]:
        return _best(chosen, root)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return _named_outright(root, path, module)
    within = [stack for stack in stacks if path.startswith(f"{stack.public.path}.")]
    around = [stack for stack in stacks if stack.public.path.startswith(f"{path}.")]
    if not within and not around:
        raise HookpointError(f"{path} lies in no stack of blocks. {_listing(root, stacks)}")
    return _best(within or around, root)


def stacks_of(model: nn.Module, owner: nn.Module) -> list[ResidualBlocks]:
    """The stacks of blocks that a model inside owns."""
    return [s.public for s in _stacks(unwrap(model)) if s.public.owner is owner]


def resolve(model: nn.Module, at: int | str) -> Hookpoint:
    """The hookpoint that `at` names.

    Args:
        model: any model of transformers, wrapped or not.
        at: a layer, counted from 0; a hookpoint, `layers.7.resid_post` (or `layers.7`); or a module
            path, `transformer.h.3.mlp`, with or without a site. A module path may have or lack the
            prefix of a wrapper, and may lack modules before its list of blocks when only one
            module can be meant: `model.layers.12` finds `model.language_model.layers.12`.

    Raises:
        HookpointError: nothing or several things are called that, or it cannot be hooked.
    """
    if isinstance(at, bool) or not (isinstance(at, str) or hasattr(at, "__index__")):
        raise HookpointError(f"a place is a layer, a hookpoint or a module path; got {at!r}.")
    root = unwrap(model)
    stacks = _stacks(root)
    path, site = _split_site(at, root) if isinstance(at, str) else (str(operator.index(at)), None)
    # a number, or `layers.7` unless the model has another list of that name
    is_layer = re.fullmatch(r"(layers\.)?-?\d+", path)
    if is_layer and not (is_layer[1] and _has_other_layers(root, stacks)):
        blocks, layer = _best(stacks, root), int(path.removeprefix("layers."))
        if not 0 <= layer < len(blocks):
            raise HookpointError(
                f"no block {layer} in {type(root).__name__}: {_range(blocks)}. "
                "Layers count from 0 and the embedding is not one of them."
            )
        path, module = blocks.paths[layer], blocks.blocks[layer]
    else:
        path, module = _find(root, path, stacks)
    return _hookpoint(root, path, module, site or "resid_post", stacks)


def _inside_wrapper(module: nn.Module) -> nn.Module | None:
    if (inner := module._modules.get("_orig_mod")) is not None:
        return inner
    # A PreTrainedModel may have a peft_config too (add_adapter), but no get_base_model.
    if hasattr(module, "peft_config") and callable(getattr(module, "get_base_model", None)):
        return cast(nn.Module, cast(Any, module).get_base_model())
    if _WRAPPERS & {cls.__name__ for cls in type(module).__mro__}:
        return cast(nn.Module, module.module)
    return None


def _read(thing: Any, name: str, call: bool = False) -> Any:
    """`thing.name`, or what it returns when called; None if that raises anything."""
    try:
        value = getattr(thing, name)
        return value() if call else value
    except Exception:  # an ambiguous get_text_config, or a config with values and errors per layer
        return None


def _is_called(module: nn.Module) -> bool:
    # A compiled module has its forward on the instance, so its class does not tell.
    return type(unwrap(module)).forward is not nn.Module.forward


def _model_type(module: nn.Module) -> Any:
    return _read(_read(module, "config"), "model_type")


def _stacks(root: nn.Module) -> list[_Stack]:
    """Every outermost list of blocks, in module order; lists within blocks only through `at`."""
    # The model of transformers need not be the root: value heads, a user's own module.
    head = next((module for module in root.modules() if isinstance(module, PreTrainedModel)), root)
    found = list(_lists(root, "", root))
    decoder = _decoder(head, [container for container, *_ in found])
    inside = {id(module) for module in decoder.modules()}
    config = _read(head, "config")
    main_configs = [config, _read(config, "get_text_config", call=True)]
    stacks = []
    for container, public, recorded, counted in found:
        config = _read(public.owner, "config")
        main = config is not None and any(config is other for other in main_configs)
        is_inside = id(container) in inside
        # T5 deep-copies its config for each half, so `is` alone would miss its decoder.
        kin = _model_type(public.owner) == _model_type(decoder)
        decoding = is_inside and (main or kin or public.owner is decoder or len(found) == 1)
        rank = (recorded or counted, main, is_inside, recorded, counted)
        stacks.append(_Stack(replace(public, decoding=decoding), container, rank))
    return stacks


def _lists(
    parent: nn.Module, path: str, owner: nn.Module, owner_path: str = ""
) -> Iterator[tuple[nn.Module, ResidualBlocks, bool, bool]]:
    if isinstance(parent, PreTrainedModel):
        owner, owner_path = parent, path
    for name, child in parent.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList | nn.Sequential):
            public = _describe(child, child_path, owner, owner_path)
            # Blocks have parts and are called; layer norms, linear heads and dicts do not qualify.
            if len(public) and all(block._modules and _is_called(block) for block in public.blocks):
                recorded = _is_recorded(owner, public)
                counted = not {len(public), len(child)}.isdisjoint(_depths(owner))
                if recorded or counted or isinstance(child, nn.ModuleList):
                    yield child, public, recorded, counted
                    continue
        yield from _lists(child, child_path, owner, owner_path)


def _describe(container: nn.Module, path: str, owner: nn.Module, owner_path: str) -> ResidualBlocks:
    items = dict(_flat(container, path))
    blocks, paths = tuple(items.values()), tuple(items)
    return ResidualBlocks(path, blocks, paths, owner, owner_path, decoding=False)


def _flat(container: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, item in container._modules.items():  # named_children would drop a shared block
        if isinstance(item, nn.ModuleList):
            yield from _flat(item, f"{path}.{name}")
        elif item is not None:
            yield f"{path}.{name}", item


def _decoder(head: nn.Module, containers: list[nn.Module]) -> nn.Module:
    """What `generate` decodes with: `get_decoder` until it returns itself; some need the repeat."""
    decoder, seen = head, {id(head)}
    while isinstance(inner := _read(decoder, "get_decoder", call=True), nn.Module):
        modules = {id(module) for module in inner.modules()}
        if id(inner) in seen or not any(id(container) in modules for container in containers):
            break  # a `decoder` without blocks is a head, not the language model
        decoder = inner
        seen.add(id(inner))
    return decoder


def _is_recorded(owner: nn.Module, stack: ResidualBlocks) -> bool:
    """Does transformers return the outputs of these blocks as `hidden_states`?"""
    specs = (_read(owner, "_can_record_outputs") or {}).get("hidden_states", ())
    for spec in specs if isinstance(specs, list | tuple) else [specs]:
        place = _read(spec, "layer_name")
        if place and f".{place.strip('.')}." not in f".{stack.path}.":
            continue
        kind = _read(spec, "target_class") or spec
        ending = spec if isinstance(spec, str) else _read(spec, "class_name")
        for path, block in zip(stack.paths, stack.blocks, strict=True):
            is_of_kind = isinstance(kind, type) and isinstance(unwrap(block), kind)
            if is_of_kind or (ending and path.endswith(ending)):
                return True
    return False


def _depths(owner: nn.Module) -> set[Any]:
    config = _read(owner, "config")
    configs = [config, _read(config, "get_text_config", call=True)]
    return {
        depth
        for each in configs
        for name in _DEPTHS.split()
        if isinstance(depth := _read(each, name), int)
    }


def _best(stacks: list[_Stack], root: nn.Module) -> ResidualBlocks:
    if not stacks:
        raise HookpointError(
            f"no residual blocks in {type(root).__name__}: looked for a ModuleList of modules that "
            "have parts of their own. Name the module to hook by its path; that always works."
        )
    # a tie is an error: the wrong stack would be read without a word
    top = [stack for stack in stacks if stack.rank == max(other.rank for other in stacks)]
    for stack in top:
        if _model_type(stack.public.owner) in _NO_BLOCKS:
            _refuse(stack.public, root)
    if len(top) > 1:
        raise HookpointError(
            f"{len(top)} stacks of blocks of {type(root).__name__} fit equally well: "
            f"{'; '.join(map(str, top))}. Choose one by its path, at={top[0].public.path!r}, "
            f"or one of its blocks, at={top[0].public.paths[0]!r}."
        )
    return top[0].public


def _refuse(blocks: ResidualBlocks, root: nn.Module) -> NoReturn:
    why, path = _NO_BLOCKS[_model_type(blocks.owner)]
    path = f"{blocks.owner_path}.{path}".lstrip(".")
    raise HookpointError(
        f"the layers of {type(root).__name__} cannot be hooked: {why}. Name a module by its path "
        f"instead, {path!r} with the layer for <i>."
    )


def _named_outright(root: nn.Module, path: str, container: nn.Module) -> ResidualBlocks:
    """A list that nobody would have picked is still a stack if the user says so."""
    owners = [(name, m) for name, m in root.named_modules() if isinstance(m, PreTrainedModel)]
    around = [(n, m) for n, m in owners if f"{path}.".startswith(f"{n}." if n else "")]
    owner_path, owner = around[-1] if around else ("", root)
    blocks = _describe(container, path, owner, owner_path)
    if not len(blocks):
        raise HookpointError(f"{path} in {type(root).__name__} is an empty list: no block to hook.")
    return blocks


def _has_other_layers(root: nn.Module, stacks: list[_Stack]) -> bool:
    """Is there a list called `layers` that is not the default stack? Then the literal path wins."""
    return "layers" in root._modules and _default_path(root, stacks) != "layers"


def _default_path(root: nn.Module, stacks: list[_Stack]) -> str | None:
    try:
        return _best(stacks, root).path
    except HookpointError:
        return None


def _hookpoint(
    root: nn.Module, path: str, module: nn.Module, site: Site, stacks: list[_Stack]
) -> Hookpoint:
    if not _is_called(module):
        parts = ", ".join(f"{path}.{name}" for name in list(module._modules)[:3]) or "it has none"
        raise HookpointError(
            f"{path} in {type(root).__name__} is a {type(module).__name__}, which is never called. "
            f"Name one of its parts: {parts}."
        )
    blocks = next((s.public for s in stacks if path.startswith(f"{s.public.path}.")), None)
    layer, name = None, f"{path}.{site}"
    if blocks is not None:
        layer = next(
            i for i, block in enumerate(blocks.paths) if f"{path}.".startswith(f"{block}.")
        )
        if path == blocks.paths[layer]:
            if _model_type(blocks.owner) in _NEVER_FIRE:
                _refuse(blocks, root)
            # only blocks of the default stack get the short name, which every model shares
            is_default = blocks.path == _default_path(root, stacks)
            if is_default and not _has_other_layers(root, stacks):
                name = hookpoint_of(layer, site)
    return Hookpoint(name, path, module, site, layer, blocks)


def _split_site(at: str, root: nn.Module) -> tuple[str, Site | None]:
    path, _, site = at.rpartition(".")
    if path and site in SITES:
        return path, site
    if path and site.startswith("resid_"):
        raise HookpointError(
            f"no site {site!r} at {path} in {type(root).__name__}: the sites are resid_pre (what "
            "goes into the block) and resid_post (what comes out). resid_mid lies inside the block "
            "and differs by architecture; name a module in the block by its path instead."
        )
    return at, None


def _find(root: nn.Module, path: str, stacks: list[_Stack]) -> tuple[str, nn.Module]:
    """The module at `path`, or the only one that can be meant by it, with its own path."""
    for tried in dict.fromkeys([path, *(re.sub(prefix, "", path) for prefix in _PEFT_PREFIXES)]):
        if (found := _walk(root, tried)) is not None:
            return found
    # not as it stands: the only module whose path ends so, or lacks some modules before
    names = [name for name, _ in root.named_modules() if name]
    meant = [name for name in names if name.endswith(f".{path}")]
    if len(meant) != 1:
        meant = meant or [name for name in names if _may_lack_modules(path, name)]
        default = _default_path(root, stacks)
        in_default = [name for name in meant if f"{name}.".startswith(f"{default}.")]
        meant = in_default if len(in_default) == 1 else meant
    if len(meant) == 1:
        return meant[0], root.get_submodule(meant[0])
    # nothing is guessed: the error lists what could be meant
    close = meant or difflib.get_close_matches(path, names, n=3)
    raise HookpointError(
        f"{'several modules' if meant else 'no module'} {path!r} in {type(root).__name__}"
        f"{': ' if meant else ', close to it: '}{', '.join(close[:5]) or 'none'}. "
        f"{_listing(root, stacks)} Name a layer, `layers.<i>.resid_post`, or a module path."
    )


def _may_lack_modules(path: str, name: str) -> bool:
    """Is `name` `path` with more modules before the list of blocks?

    A text model has fewer modules there alone than inside a multimodal model. From the list of
    blocks on, both paths must agree, or the path of an expert could match.
    """
    parts, whole = path.split("."), name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    head, tail = parts[: max(first - 1, 0)], parts[max(first - 1, 0) :]
    before = whole[: len(whole) - len(tail)]
    if whole[len(before) :] != tail or any(part.isdigit() for part in before):
        return False
    rest = iter(before)
    return all(part in rest for part in head)


def _walk(root: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """Follow `path`, into and past the wrappers of single modules that it may have or lack."""
    module, taken = root, list[str]()
    parts = path.split(".")
    while parts:
        # _modules, as a wrapper may answer for attributes of what it wraps
        child = module._modules.get(parts[0])
        if child is not None:
            taken.append(parts.pop(0))
            module = child
        elif wrapped := [name for name in _MODULE_WRAPPERS if name in module._modules]:
            taken.append(wrapped[0])
            module = module.get_submodule(wrapped[0])
        elif parts[0] in (*_MODULE_WRAPPERS, "module"):
            parts.pop(0)
        else:
            return None
    return (".".join(taken), module) if taken else None


def _range(blocks: ResidualBlocks) -> str:
    return f"{blocks.path} has blocks 0 to {len(blocks) - 1}"


def _listing(root: nn.Module, stacks: list[_Stack]) -> str:
    return (
        f"In {type(root).__name__}: {'; '.join(_range(s.public) for s in stacks) or 'no blocks'}."
    )
