"""A checkpoint as a reader returns it, and how it becomes a `SwitchSAE`.

A reader settles two things: the fields and tensors of our own layout, and `formula`, the format's
own arithmetic, written out densely on the file's own tensors. `parity` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.hub.source import Source
from hf_switch_sae.lm.names import SITES, hookpoint_of
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE

Formula = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Given:
    """What the user tells of a checkpoint, where its files don't.

    Args:
        k: features per token.
        layer: block of the language model, from 0; short for hookpoint `layers.<layer>.resid_post`.
        hookpoint: where the SAE reads and writes; overrides what the files say.
        base_model: Hub id of the language model; overrides what the files say.
        heaviside: for switch_sae: whether the router's probability is left out of the activations.
        experts_per_token: for Scale-SAE: how many experts encode a token.
        input_scale: what the residual stream is multiplied by before the SAE sees it.
        threshold: for a BatchTopK SAE whose files have none: the activation to exceed.
        dict_class: for dictionary_learning without a config.json: the class.
    """

    k: int | None = None
    layer: int | None = None
    hookpoint: str | None = None
    base_model: str | None = None
    heaviside: bool | None = None
    experts_per_token: int | None = None
    input_scale: float | None = None
    threshold: float | None = None
    dict_class: str | None = None

    def settle(self, name: str, found: Any, source: Source) -> Any:
        """The value of a field, as the files or the user tell it.

        Raises:
            ConversionError: neither tells, or they differ.
        """
        given = getattr(self, name)
        if given is None and found is None:
            raise ConversionError(f"{source.where} does not tell its {name}: pass {name}=.")
        # unlike a hookpoint, these decide what the SAE computes, so the files can't be overruled
        if given is not None and found is not None and given != found:
            raise ConversionError(f"{name}={given} contradicts {source.where}, which has {found}.")
        return found if given is None else given

    def place(self, found: str | None, source: Source, their_name: object = None) -> str:
        """The hookpoint, as the user or else the files tell it.

        Args:
            found: what the files tell; None if they don't.
            source: the files.
            their_name: what the files call the place, if that is no hookpoint of ours.

        Raises:
            ConversionError: neither tells, or the user's has no site.
        """
        if self.hookpoint is not None:
            # a module's path alone leaves open whether its input or its output is meant
            path, _, site = self.hookpoint.rpartition(".")
            if not path or site not in SITES:
                raise ConversionError(
                    f"hookpoint={self.hookpoint!r} names no site: it is a block or a module with "
                    "its side, 'layers.<i>.resid_post' or '<module path>.resid_pre'."
                )
            return self.hookpoint
        if self.layer is not None and found is None:
            return hookpoint_of(self.layer)
        # where the files tell the place, layer= may only agree with them
        if self.layer is not None and found is not None:
            self._check_layer(found, source)
        if found is not None:
            return found
        but = "" if their_name is None else f" ({their_name!r} names no place that is known here)"
        raise ConversionError(
            f"{source.where} does not tell where it reads and writes{but}: pass layer=, or "
            "hookpoint='layers.<i>.resid_post' or a module path with its site."
        )

    def _check_layer(self, found: str, source: Source) -> None:
        # `found` may be a path within a block, which `layer_of` does not parse
        if str(self.layer) not in found.split("."):
            raise ConversionError(
                f"layer={self.layer} contradicts {source.where}, which is of {found}; "
                "pass hookpoint= if you mean to use it elsewhere."
            )


GIVEN = frozenset(field.name for field in fields(Given))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another project in our layout, not yet a model.

    Args:
        format: the reader's NAME.
        config: fields of SwitchSAEConfig.
        weights: W_enc, W_dec [E, m, d], and whatever else the config calls for, by the name of the
            parameter or buffer.
        formula: x [n, d] -> dense acts [n, F] in the format's own units, reconstruction [n, d].
    """

    format: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    formula: Formula

    def build(self, dtype: torch.dtype | None = None) -> SwitchSAE:
        """The SAE, in float32 unless a dtype is given or its weights share a 16-bit one."""
        sae = SwitchSAE(SwitchSAEConfig(**self.config))
        # as `from_pretrained` does: in training, a batch_topk SAE does not use its threshold
        sae.train(False)

        # router.weight is found among the parameters, everything else is an attribute of the SAE
        parameters = dict(sae.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                target = parameters[name] if "." in name else getattr(sae, name)
                target.copy_(value)

        # a checkpoint whose matrices and biases share a 16-bit dtype stays in it
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        dtypes = {self.weights[name].dtype for name in names if name in self.weights}
        if dtype is None and len(dtypes) == 1 and next(iter(dtypes)).itemsize == 2:
            dtype = dtypes.pop()
        if dtype is not None:
            sae.to(dtype)  # type: ignore[arg-type]
        return sae


@dataclass(frozen=True)
class OneExpert:
    """The weights of an SAE of one expert, each feature a row, as most formats have them.

    Args:
        W_enc, W_dec: [F, d].
        b_enc: [F].
        b_dec: [d].
        activation, k, input_norm: as in SwitchSAEConfig.
        subtracts: whether the encoder sees x - b_dec.
        threshold: [F], or 0-d if all features share it; for jumprelu and batch_topk.
        input_scale: biases and thresholds are in units of x times this.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    activation: str
    subtracts: bool
    k: int | None = None
    threshold: Tensor | None = None
    input_scale: float = 1.0
    input_norm: str = "none"

    def checkpoint(self, format: str, about: Mapping[str, Any], formula: Formula) -> Checkpoint:
        """The checkpoint; `about` is what `origin_fields` returns."""
        features, width = self.W_enc.shape
        weights = {
            "W_enc": self.W_enc[None],
            "W_dec": self.W_dec[None],
            "b_enc": self.b_enc[None],
            "b_dec": self.b_dec,
            "input_scale": torch.tensor(self.input_scale, dtype=torch.float32, device="cpu"),
        }
        if self.threshold is not None:
            weights["threshold"] = self.threshold.float().expand(features)
        config = {
            "hidden_size": width,
            "num_features": features,
            "num_experts": 1,
            "encoder_bias": True,
            "activation": self.activation,
            "input_norm": self.input_norm,
            "k": self.k,
            "subtract_b_dec": self.subtracts,
            **about,
        }
        return Checkpoint(format, config, weights, formula)


def origin_fields(
    source: Source,
    given: Given,
    format: str,
    hookpoint: str | None,
    their_name: object = None,
    base_model: object = None,
    **origin: Any,
) -> dict[str, Any]:
    """The config fields that say where an SAE belongs and where it comes from.

    Args:
        source, given: what the reader was given.
        format: the reader's NAME.
        hookpoint: as the files tell; None if they don't.
        their_name: what the files call the place, if that is no hookpoint of ours.
        base_model: what the files call the language model; recorded as it is, and used as a Hub id
            only if it has the form of one.
        origin: what else the files say about where they come from.

    Raises:
        ConversionError: neither files nor user tell the hookpoint.
    """
    # "gpt2-small" or "google/x/y" is no repository, whatever project calls its model so
    is_hub_id = isinstance(base_model, str) and base_model.count("/") == 1
    known = {**source.provenance(), "format": format, "model_name": base_model, **origin}
    return {
        "hookpoint": given.place(hookpoint, source, their_name),
        "base_model": given.base_model or (base_model if is_hub_id else None),
        "source": {name: value for name, value in known.items() if value is not None},
    }


def integer(value: Any, name: str, where: str) -> int | None:
    """A whole number from a config; None if it is absent.

    Raises:
        ConversionError: it is something else.
    """
    # k may come from a 0-d tensor, and `Tensors.number` gives that as a float
    if value is None or (isinstance(value, float) and value.is_integer()):
        return None if value is None else int(value)
    # to Python, True is an int
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConversionError(f"{name}={value!r} in {where} is no whole number.")
    return value
