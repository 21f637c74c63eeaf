"""How text becomes rows of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_switch_sae.errors import TextError


@dataclass(frozen=True)
class ActivationSettings:
    """How text becomes rows; the defaults suit most models.

    Raises:
        TextError: a value out of its range.
    """

    context: int = 256
    """Tokens the language model sees at once."""
    packing: Literal["auto", "packed", "windows"] = "auto"
    """"packed" joins documents and cuts every `context` tokens, "windows" cuts each document by
    itself, "auto" packs for causal models and takes windows for those that look both ways."""
    boundary: str = "auto"
    """What stands between documents: "bos", "eos", "none", a token's text, or "auto": what the
    tokenizer itself adds; see `contexts.Marks`."""
    skip_first: bool | None = None
    """Leave out the first token of each context; by default only if documents are packed."""
    skip_special: bool = True
    """Leave out special tokens; the language model sees them."""
    outlier_factor: float | None = 6.0
    """Leave out tokens whose norm exceeds the median norm times this; None keeps them."""
    tokens_per_pass: int | None = None
    """Tokens per pass of the language model; by default 2,048 on a CPU, else 16,384."""
    buffer_bytes: int | None = None
    """Memory for shuffling, at most; for the default see `shuffle.default_buffer_bytes`."""
    dtype: str | None = None
    """The dtype that rows are kept in: "float32", "bfloat16" or "float16"; by default the residual
    stream's own."""
    seed: int = 0
    """Decides the order of rows."""

    def __post_init__(self) -> None:
        for name in ("context", "tokens_per_pass", "buffer_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TextError(f"{name}={value} is not at least 1.")
        if self.outlier_factor is not None and self.outlier_factor <= 1:
            raise TextError(
                f"outlier_factor={self.outlier_factor} would leave out every other token: give "
                "more than 1, or None to keep them all."
            )
        if self.packing not in ("auto", "packed", "windows"):
            raise TextError(f"packing={self.packing!r} is none of auto, packed, windows.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise TextError(f"dtype={self.dtype!r} is none of float32, bfloat16, float16.")
