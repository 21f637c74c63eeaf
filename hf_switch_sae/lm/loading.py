"""A language model and its tokenizer by name, as far as its blocks are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_switch_sae.errors import HookpointError, SwitchSAEError
from hf_switch_sae.lm.hookpoints import find_residual_blocks
from hf_switch_sae.lm.names import layer_named


def load_lm(
    name: str,
    dtype: str,
    device_map: str | None,
    revision: str | None = None,
    with_head: bool = True,
    gguf_file: str | None = None,
    places: Sequence[int | str] | None = None,
) -> tuple[torch.nn.Module, Any]:
    """A language model in eval mode, on a GPU if there is one, and its tokenizer.

    Args:
        name: Hub id or folder.
        dtype, device_map, revision: as of `from_pretrained`.
        with_head: False for the residual stream alone, of any kind of model.
        gguf_file: the name of a GGUF file in there, to be dequantized.
        places: layers or hookpoints that will be read. Blocks after the last of them are not
            loaded, where the architecture allows; None: load all.

    Raises:
        SwitchSAEError: there is none at that address, or no such dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SwitchSAEError(f"no dtype {dtype!r}: auto, float32, bfloat16 or float16.")
    # one GPU, if there is one; more are the user's to ask for
    if device_map is None and torch.cuda.is_available():
        device_map = "cuda"
    kind = AutoModelForCausalLM if with_head else AutoModel
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    options = {**where, "dtype": dtype, "device_map": device_map}
    try:
        lm = None
        # reading layer 3 of 40 needs no more than 4 blocks in memory
        if gguf_file is None and not with_head and places:
            lm = _first_blocks(name, blocks_up_to(places), options)
        if lm is None:
            lm = kind.from_pretrained(name, **options)
        return lm.eval(), AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as err:
        raise SwitchSAEError(f"no language model at {name}: {err}") from err


def has_head(name: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is of a causal model with its head: others would get a random one.

    Raises:
        SwitchSAEError: there is no model at that address.
    """
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        kinds = AutoConfig.from_pretrained(name, **where).architectures or []
    except (OSError, ValueError) as err:
        raise SwitchSAEError(f"no language model at {name}: {err}") from err
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(kind in known or kind.endswith("ForCausalLM") for kind in kinds)


def blocks_up_to(places: Sequence[int | str]) -> int | None:
    """How many blocks it takes to read these; None if one is a module path."""
    layers = [layer_named(at) for at in places]
    return None if None in layers else max(layer for layer in layers if layer is not None) + 1


def _first_blocks(name: str, count: int | None, options: dict[str, Any]) -> Any:
    """A model with only its first `count` blocks; None if that is not possible or saves nothing."""
    revision = {key: options[key] for key in options.keys() & {"revision"}}
    config = AutoConfig.from_pretrained(name, **revision)
    whole = getattr(config, "num_hidden_layers", None)
    if count is None or not isinstance(whole, int) or count >= whole:
        return None
    level = logging.get_verbosity()
    logging.set_verbosity(40)  # transformers would list the weights left out as unexpected
    try:
        lm = AutoModel.from_pretrained(name, **options, num_hidden_layers=count)
        if len(find_residual_blocks(lm)) != count:
            return None
    except (ValueError, TypeError, IndexError, RuntimeError, HookpointError):
        return None  # an architecture whose config says more of its layers than their number
    finally:
        logging.set_verbosity(level)
    lm.config.num_hidden_layers = whole  # so that its fingerprint is the whole model's
    return lm
