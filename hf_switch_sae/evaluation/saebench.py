"""A SwitchSAE -> an SAE as SAEBench wants it: dense activations, and its names for everything.

    from hf_switch_sae import SwitchSAE
    from hf_switch_sae.evaluation.saebench import SAEBenchAdapter

    sae = SAEBenchAdapter(SwitchSAE.from_pretrained(...), model_name="pythia-70m-deduped")
    # as a custom SAE of SAEBench: selected_saes = [("my_release", sae)]

How    SAEBench needs no base class, only the members of its `BaseSAE` (custom_saes/base_sae.py):
       `encode`, `decode`, `forward`, `W_enc`, `W_dec`, `b_enc`, `b_dec`, `cfg`, `device`, `dtype`,
       `to`, `check_decoder_norms`. All values are in the language model's own units.
Beware `encode` is routed: a feature is active only on tokens of its expert, and acts include the
       router's probability. `W_enc` and `b_enc` hold all experts' rows side by side, so
       relu(x @ W_enc + b_enc) is not the encoder, but the SAE with its router left out.
       Dense activations of n tokens take n * num_features numbers: choose small batches.
       An outlier (`SwitchSAE.outlier_norm`) has no active feature, so SAEBench replaces it by the
       decoder's bias. Leave special tokens out of the reconstruction
       (`exclude_special_tokens_from_reconstruction`), or the cross entropies show only that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.lm.names import layer_of
from hf_switch_sae.ops.precision import name_of
from hf_switch_sae.sae.model import SwitchSAE


@dataclass
class SAEBenchMetadata:
    """What newer versions of SAEBench read as `cfg.metadata`."""

    model_name: str
    hook_name: str
    hook_layer: int
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    dataset_path: str = ""
    sae_lens_version: str | None = None
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None


@dataclass
class SAEBenchConfig:
    """The fields of SAEBench's CustomSAEConfig."""

    model_name: str
    """TransformerLens's name of the language model."""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    """TransformerLens's name of the hookpoint."""
    metadata: SAEBenchMetadata
    architecture: str = "switch"
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    context_size: int | None = None
    hook_head_index: int | None = None
    finetuning_scaling_factor: bool = False
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[Any, ...] = (None,)
    training_tokens: int = -1
    """Negative as in SAEBench's own default: not known."""
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None


class SAEBenchAdapter(nn.Module):
    """A SwitchSAE in SAEBench's shape; see the module's header for limits.

    Args:
        sae: is put in eval mode; its weights are shared, not copied.
        model_name: TransformerLens's name of the language model; by default the SAE's base model.
        hook_layer: by default the layer of the SAE's hookpoint.
        context_size: the context length for some of SAEBench's evaluations.

    Raises:
        ConfigError: the SAE normalizes each token, so its `decode` needs the token, which SAEBench
            does not pass; or model or hookpoint are not known.
    """

    def __init__(
        self,
        sae: SwitchSAE,
        model_name: str | None = None,
        hook_layer: int | None = None,
        context_size: int | None = None,
    ) -> None:
        super().__init__()
        config = sae.config
        if config.input_norm != "none":
            raise ConfigError(
                f"SAEBench calls decode(acts) alone, and with input_norm={config.input_norm!r} a "
                "reconstruction depends on the token too: this SAE can't be measured by it."
            )
        model_name = model_name or config.base_model
        if not model_name:
            raise ConfigError("the SAE's config names no base model: give model_name.")
        layer, site = _layer_and_site(config.hookpoint, hook_layer)
        self.sae = sae
        sae.train(False)
        hook_name = f"blocks.{layer}.hook_{site}"
        about = {"hook_name": hook_name, "hook_layer": layer, "context_size": context_size}
        plain = config.num_experts == 1
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            d_in=config.hidden_size,
            d_sae=config.num_features,
            architecture=config.activation if plain else f"switch_{config.activation}",
            apply_b_dec_to_input=config.subtract_b_dec,
            activation_fn_str=config.activation,
            activation_fn_kwargs={} if config.k is None else {"k": config.k},
            metadata=SAEBenchMetadata(model_name=model_name, **about),  # type: ignore[arg-type]
            **about,  # type: ignore[arg-type]
        )
        self._update_cfg()

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], all experts' rows side by side."""
        return self.sae.W_enc.flatten(0, 1).T

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in]."""
        return self.sae.W_dec.flatten(0, 1)

    @property
    def b_enc(self) -> Tensor:
        """[d_sae]; 0 if the SAE has none."""
        # the SAE adds it to scaled rows, SAEBench to rows in the model's units
        bias = self.sae.b_enc
        if bias is None:
            return self.W_dec.new_zeros(self.cfg.d_sae)
        return (bias.flatten() / self.sae.input_scale).to(self.dtype)

    @property
    def b_dec(self) -> Tensor:
        """[d_in]."""
        # kept in scaled units, unlike acts, which `encode` returns in the model's own
        return (self.sae.b_dec / self.sae.input_scale).to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what `encode` and `decode` return."""
        return self.sae.dtype

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchAdapter:
        """As `nn.Module.to`; `cfg` follows."""
        super().to(*args, **kwargs)
        # SAEBench reads device and dtype off `cfg` as well
        self._update_cfg()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> activations [..., d_sae], 0 where a feature is not active."""
        features: SparseFeatures = self.sae.encode(x.to(self.device, self.dtype))
        return features.to_dense().to(self.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations [..., d_sae] -> reconstruction [..., d_in]."""
        acts = feature_acts.to(self.device, self.dtype)
        # not `sae.decode`: SAEBench edits activations, and then more than k may be active
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_in]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether all decoder rows have length 1, within SAEBench's own tolerance."""
        reduced = self.dtype in (torch.bfloat16, torch.float16)
        error = (self.W_dec.float().norm(dim=1) - 1).abs().max()
        return bool(error <= (1e-2 if reduced else 1e-5))

    def _update_cfg(self) -> None:
        self.cfg.device = str(self.device)
        self.cfg.dtype = name_of(self.dtype)


def _layer_and_site(hookpoint: str | None, layer: int | None) -> tuple[int, str]:
    """A hookpoint's layer, unless one is given, and TransformerLens's name of its site."""
    found = layer_of(hookpoint)
    if found is None and layer is None:
        raise ConfigError(
            f"the SAE's hookpoint {hookpoint!r} tells no layer: give hook_layer, the block whose "
            "output it reads."
        )
    # a hook_layer without a known site means that block's output
    site = "resid_post" if found is None else found[1]
    return found[0] if found is not None and layer is None else int(layer or 0), site
