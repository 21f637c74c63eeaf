"""The language model that a command names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_switch_sae.errors import SwitchSAEError


def load_lm(
    name: str,
    dtype: str,
    device_map: str | None,
    revision: str | None = None,
    with_head: bool = True,
) -> tuple[torch.nn.Module, Any]:
    """A language model in eval mode, on a GPU if there is one, and its tokenizer.

    Args:
        name: Hub id or folder.
        dtype, device_map, revision: as of `from_pretrained`.
        with_head: False for the residual stream alone, of any kind of model.

    Raises:
        SwitchSAEError: there is none at that address.
    """
    if device_map is None and torch.cuda.is_available():
        device_map = "cuda"
    kind = AutoModelForCausalLM if with_head else AutoModel
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        lm = kind.from_pretrained(name, dtype=dtype, device_map=device_map, **where)
        return lm.eval(), AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as err:
        raise SwitchSAEError(f"no language model at {name}: {err}") from err
