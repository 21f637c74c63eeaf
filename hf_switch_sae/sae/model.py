"""Residual stream -> SparseFeatures -> reconstruction: the Switch SAE as a `PreTrainedModel`.

    logits = router.weight @ (s * x - b_router)          e = argmax,  p = softmax(logits)[e]
    acts   = topk_k( p * relu(W_enc[e] @ (x - b_dec / s) + b_enc[e] / s) )
    x_hat  = sum_j acts[j] * W_dec[ids[j]] + b_dec / s

`s` is `input_scale`, a buffer: biases, router and thresholds live in the scaled units in which
training is well conditioned, while `x`, `acts` and `x_hat` are in the language model's own. So an
activation is exactly what is added along its decoder row, and no weight needs folding.

With `input_norm` all of this happens to the normalized token. What leaves is in the language
model's units again: acts times the token's unit, x_hat times it plus what was subtracted. So an
activation means the same as ever, but a reconstruction needs the token for its unit.

The steps are in files of their own: `encoding.py`, `losses.py`, `calibration.py`. In memory the
experts lie in groups (`experts.py`); in the checkpoint `W_enc` and `W_dec` are one tensor each,
however many groups there are.

Beware transformers returns buffers that are not persistent as uninitialized memory, so every buffer
here is persistent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init

from hf_switch_sae import ops
from hf_switch_sae.errors import ConfigError, FeatureIdError
from hf_switch_sae.features import SparseFeatures, check_feature_ids
from hf_switch_sae.lm.config import config_of
from hf_switch_sae.lm.fingerprint import base_model_fields
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.sae.calibration import calibrate, update_statistics
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.encoding import (
    Encoded,
    as_ordered,
    bias_of,
    check_width,
    counted_of,
    encode_tokens,
    mask_of,
    outliers_among,
    rows_of,
)
from hf_switch_sae.sae.experts import ExpertGroup, Experts, Router, register_checkpoint_layout
from hf_switch_sae.sae.fvu import WholeBatch, batch_sums
from hf_switch_sae.sae.input_norm import normalized, unit_of
from hf_switch_sae.sae.losses import losses_of
from hf_switch_sae.sae.output import SwitchSAEOutput
from hf_switch_sae.sae.rows import normalize_rows, project_rows, row_blocks
from hf_switch_sae.sae.single_token import plan_of

_OTHER_LOSSES = [f.name for f in fields(SwitchSAEOutput) if f.name.endswith("_loss")]
"""All but FVU; the coefficient of each is `<name>_coef` in the config."""


class SwitchSAE(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A sparse autoencoder with its features split over experts; the router picks each token's.

    Parameters, E experts of m features over a residual stream of width d:
        W_enc [E, m, d], W_dec [E, m, d] (one feature = one row in both), b_enc [E, m] or None,
        b_dec [d], router.weight [E, d] and b_router [d] (with E > 1).
    Buffers, all persistent, float32 but for the counts of tokens, which are int64:
        input_scale [], threshold [F] (jumprelu, batch_topk), feature_max [F], feature_rate [F],
        residual_norm [], statistics_tokens [] (how many tokens the last three were measured on;
        0: not measured), outlier_norm [] (tokens with a larger norm, such as attention sinks, are
        no input: they have no active feature, no part in the loss, and are not spliced),
        num_tokens_since_fired [F] (training: tokens routed to the feature's expert since).

    Args:
        config: a SwitchSAEConfig.
        expert_groups: G, a divisor of E or "each" for E: in how many modules the experts lie in
            memory. Also an argument of `from_pretrained`, where an automatic `device_map` makes
            "each" the default.

    Raises:
        ConfigError: expert_groups does not divide num_experts.

    Source: Mudide et al. 2024, arXiv:2410.08201.
    """

    config_class = SwitchSAEConfig
    config: SwitchSAEConfig
    main_input_name = "hidden_states"
    base_model_prefix = ""
    input_modalities = ("residual_stream",)  # type: ignore[assignment]
    _no_split_modules: ClassVar[list[str]] = ["ExpertGroup", "Router"]  # type: ignore[misc]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [  # type: ignore[misc]
        "router",
        "b_router",
        "input_scale",
        "threshold",
        "feature_max",
        "feature_rate",
        "residual_norm",
        "outlier_norm",
    ]
    input_scale: Tensor
    threshold: Tensor
    feature_max: Tensor
    feature_rate: Tensor
    residual_norm: Tensor
    outlier_norm: Tensor
    statistics_tokens: Tensor
    num_tokens_since_fired: Tensor
    # Sessions and foreign formats lie on higher floors. `hf_switch_sae/__init__.py` sets these:
    _open_session: ClassVar[Callable[..., Any]]  # sessions.attach.attach
    _load_foreign: ClassVar[Callable[..., Any]]  # formats.loading.load_foreign
    _pin_revision: ClassVar[Callable[..., None]]  # formats.loading.pin_revision

    def __init__(self, config: SwitchSAEConfig, expert_groups: int | Literal["each"] = 1) -> None:
        super().__init__(config)
        groups = config.num_experts if expert_groups == "each" else expert_groups
        is_count = isinstance(groups, int) and not isinstance(groups, bool)
        if not is_count or groups < 1 or config.num_experts % groups:
            raise ConfigError(
                f"expert_groups={groups} does not divide "
                f"num_experts={config.num_experts}; choose one of "
                f"{[g for g in range(1, config.num_experts + 1) if config.num_experts % g == 0]}."
            )
        self.experts = Experts(
            groups,
            config.num_experts,
            config.features_per_expert,
            config.hidden_size,
            config.encoder_bias,
        )
        # b_dec is added to the stream, so it has the weights' dtype; b_router decides, in float32
        self.b_dec = nn.Parameter(torch.empty(config.hidden_size))
        if config.num_experts > 1:
            self.router = Router(config.num_experts, config.hidden_size)
            self.b_router = nn.Parameter(torch.empty(config.hidden_size, dtype=torch.float32))
        for name, shape in self._statistics_shapes(config).items():
            dtype = torch.int64 if "tokens" in name else torch.float32
            self.register_buffer(name, torch.empty(shape, dtype=dtype), persistent=True)
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def _statistics_shapes(config: SwitchSAEConfig) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "input_scale": (),
            "residual_norm": (),
            "outlier_norm": (),
            "statistics_tokens": (),
        }
        for name in ("feature_max", "feature_rate", "num_tokens_since_fired"):
            shapes[name] = (config.num_features,)
        if config.activation in ("jumprelu", "batch_topk"):
            shapes["threshold"] = (config.num_features,)
        return shapes

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Encoder, router uniform within 1 / sqrt(d); decoder = encoder, unit rows; biases 0."""
        bound = self.config.initializer_range or 1 / math.sqrt(self.config.hidden_size)
        if isinstance(module, Router):
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, ExpertGroup):
            init.uniform_(module.W_enc, -bound, bound)
            init.copy_(module.W_dec, nn.functional.normalize(module.W_enc, dim=-1))
            if module.b_enc is not None:
                init.zeros_(module.b_enc)
        elif isinstance(module, SwitchSAE):
            init.zeros_(module.b_dec)
            if self.config.num_experts > 1:
                init.zeros_(module.b_router)
            for name in self._statistics_shapes(self.config):
                init.zeros_(getattr(module, name))
            init.ones_(module.input_scale)
            init.constant_(module.outlier_norm, math.inf)
            if self.config.activation == "batch_topk":
                init.constant_(module.threshold, -1.0)  # not known before training or calibrate()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> SwitchSAE:
        """As `PreTrainedModel.from_pretrained`, and `expert_groups`.

        So it takes `subfolder`, `revision`, `dtype`, `device_map` and the like.

        With `device_map="auto"` (or another automatic one) every expert becomes a module of its
        own, so that the map can spread them over devices, CPU and disk; only the routed ones are
        then brought in.

        A checkpoint of another project is recognized by its files and converted; `config.source`
        then says from what. Pass what its files don't tell: `k`, `layer`, `hookpoint` and the other
        fields of `hf_switch_sae.formats.Given`. `subfolder` may name a single file.

        Raises:
            OSError: there is no SAE at that address, or it can't be reached.
            ConversionError: a checkpoint of another project that can't be taken over exactly.
        """
        # a map spreads modules, so each expert has to be one
        if kwargs.get("device_map") in ("auto", "balanced", "balanced_low_0", "sequential"):
            kwargs.setdefault("expert_groups", "each")
        with warnings.catch_warnings():
            # accelerate takes our root parameters' names for modules; they are placed all the same
            warnings.filterwarnings(
                "ignore", "The following device_map keys do not match", UserWarning
            )
            name = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
            # our own format is tried first: recognizing others takes a listing of the files
            try:
                result = super().from_pretrained(*args, **kwargs)
            except (OSError, ConfigError) as err:
                return SwitchSAE._load_foreign(name, kwargs, err)  # type: ignore[no-any-return]
        SwitchSAE._pin_revision(result, name, kwargs)
        return result

    def train(self, mode: bool = True) -> SwitchSAE:
        """As `nn.Module.train`; leaving training gives back the memory kept for gradients."""
        if not mode:
            for group in self.experts:
                for weight in (group.W_enc, group.W_dec):
                    ops.release_gradient_of(weight)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SwitchSAE:
        """What `.to(dtype)`, `.half()` and the like run: router and statistics stay in float32, or
        become float64."""
        keep = ("router.", "b_router", *self._statistics_shapes(self.config))
        named = [*self.named_parameters(), *self.named_buffers()]
        kept = {id(tensor) for name, tensor in named if name.startswith(keep)}
        kept |= {id(p.grad) for name, p in self.named_parameters() if name.startswith(keep)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lossless = torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype
            return moved if lossless or id(tensor) not in kept else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-any-return,no-untyped-call]

    @classmethod
    def for_lm(cls, lm: nn.Module, at: int | str, **config: Any) -> SwitchSAE:
        """A fresh SAE for a place in a language model: width, hookpoint, base model taken from it.

        Args:
            lm: any Hugging Face transformer, wrapped or not.
            at: a layer, a hookpoint such as `layers.7.resid_post`, or a module path.
            config: further fields of SwitchSAEConfig, e.g. `num_features=6144, num_experts=8`.

        Raises:
            HookpointError: there is no such place in `lm`.
            ConfigError: fields that contradict each other.
        """
        place = resolve(lm, at)
        known = {"hookpoint": place.name, **base_model_fields(lm)}
        if place.blocks is not None and not place.blocks.decoding:  # a tower has a width of its own
            own = getattr(config_of(place.blocks.owner), "hidden_size", None)
            known["hidden_size"] = own or known.get("hidden_size")
        return cls(SwitchSAEConfig(**{**known, **config}))

    @property
    def W_enc(self) -> Tensor:
        """[E, m, d], encoder; with one expert group the parameter itself, else a joined copy."""
        return self.experts.joined("W_enc")

    @property
    def W_dec(self) -> Tensor:
        """[E, m, d], decoder, rows of length 1 after training; as for `W_enc`."""
        return self.experts.joined("W_dec")

    @property
    def b_enc(self) -> Tensor | None:
        """[E, m] or None, encoder bias in scaled units; as for `W_enc`."""
        return self.experts.joined("b_enc") if self.config.encoder_bias else None

    def decoder_rows(self, feature_ids: int | Sequence[int] | Tensor) -> Tensor:
        """[len(feature_ids), hidden_size]: what each feature adds to the stream, per unit of act.

        Raises:
            FeatureIdError: an id outside 0 to num_features - 1.
        """
        ids = check_feature_ids(feature_ids, self.config.num_features).to(self.device)[:, None]
        return self.experts.decode(torch.ones(ids.shape, dtype=self.dtype, device=self.device), ids)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to length 1; call it after each optimizer step.

        The length is measured in float32, or float64 where the rows are. Of an SAE that is sharded
        over processes each scales the rows it holds.

        Raises:
            ConfigError: experts are offloaded, so that what is written to them would be lost; or
                the decoder is sharded within its rows.
        """
        # what is written to offloaded weights is lost when they leave
        if any(group.W_dec.device.type == "meta" for group in self.experts):
            raise ConfigError("offloaded experts can't be changed: load the SAE without offload.")
        for group in self.experts:
            for (rows,) in row_blocks(group.W_dec):
                normalize_rows(rows)

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove each decoder row's gradient along the row, so that a step keeps its length.

        Raises:
            ConfigError: the decoder is sharded within its rows.
        """
        for group in self.experts:
            if group.W_dec.grad is not None:
                for grads, rows in row_blocks(group.W_dec.grad, group.W_dec):
                    project_rows(grads, rows)

    @property
    def device(self) -> torch.device:
        """Where inputs go and features appear: the device of `b_dec`, wherever the experts lie."""
        return self.b_dec.device

    def encode(self, hidden_states: Tensor) -> SparseFeatures:
        """Features of floating hidden_states [..., hidden_size]: acts and ids [..., slots].

        Raises:
            WidthError: the last dimension is not `hidden_size`.
            ConfigError: a batch_topk SAE without a threshold, outside training.
        """
        if (plan := plan_of(self, self.config, hidden_states)) is not None:
            if hidden_states.shape[-1] != plan.width:
                check_width(hidden_states, plan.width)
            acts, ids = plan.encode(hidden_states.cpu())
            return SparseFeatures(acts, ids, plan.num_features)
        return self._features(encode_tokens(self, hidden_states), hidden_states.shape)

    def decode(self, features: SparseFeatures, hidden_states: Tensor | None = None) -> Tensor:
        """Reconstruction [..., hidden_size] of features: linear in the activations, plus `b_dec`.

        In the SAE's dtype and on its device.

        Args:
            features: [...].
            hidden_states: [..., hidden_size] the features are of, for their units; only an SAE with
                `input_norm` needs them.

        Raises:
            ConfigError: it needs them, and they are not given.
            FeatureIdError: features of a dictionary of another width; on a CPU also an id of no
                feature. A GPU is not waited for to see its ids.
        """
        if (plan := plan_of(self, self.config, features.acts)) is not None:
            _check_dictionary(features, plan.num_features)
            return plan.decode(features.acts.cpu(), features.ids.cpu())
        delta, bias = self.decode_delta(features), bias_of(self)
        norm = self.config.input_norm
        if norm != "none":
            if hidden_states is None:
                raise ConfigError(
                    f"with input_norm={norm!r} a reconstruction depends on the token's own unit: "
                    "pass the stream too, decode(features, hidden_states)."
                )
            bias = unit_of(hidden_states.to(delta.device), norm).back(bias)
        return delta.add_(bias.to(delta.dtype))

    def decode_delta(self, features: SparseFeatures) -> Tensor:
        """sum_j acts[..., j] * W_dec[ids[..., j]], [..., hidden_size], without `b_dec`.

        Linear in the activations, which may have any sign. In the SAE's dtype and on its device.

        Raises:
            FeatureIdError: as `decode`.
        """
        _check_dictionary(features, self.config.num_features)
        acts = features.acts.to(self.b_dec.device, self.b_dec.dtype).reshape(-1, features.k)
        ids = features.ids.to(acts.device).reshape(acts.shape)
        return self.experts.decode(acts, ids).reshape(*features.shape, self.b_dec.shape[0])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        whole_batch: WholeBatch | None = None,
    ) -> SwitchSAEOutput | tuple[Any, ...]:
        """Reconstruct tokens, with the loss to train on.

        Args:
            hidden_states: [..., hidden_size], floating, in the LM's own units.
            attention_mask: [...], nonzero for the tokens that count in the losses; all by default,
                outliers excepted. In training a batch_topk SAE gives the others no features.
            return_dict: False for a plain tuple.
            whole_batch: the batch that these tokens are a part of, if it is spread over processes
                or steps: `WholeBatch.of` the parts' `batch_sums`, added up. The losses are then
                this part's shares of the whole batch's losses.

        Raises:
            WidthError: the last dimension is not `hidden_size`.
            ValueError: a mask that is not of these tokens.
        """
        check_width(hidden_states, len(self.b_dec))
        mask = mask_of(hidden_states, attention_mask)
        if mask is not None:
            # masked tokens may be nan, and nan times no gradient would still be nan
            hidden_states = hidden_states.where(mask[..., None] | hidden_states.isfinite(), 0)
        code = encode_tokens(self, hidden_states, sort=True, mask=mask)
        found = losses_of(self, code, hidden_states, whole_batch)
        if self.training:  # after the losses, which ask what was dead before this batch
            update_statistics(self, code)
        # losses that were not measured are 0, so that every output has all its fields
        none = torch.zeros_like(found.fvu)
        output = SwitchSAEOutput(
            loss=found.loss,
            reconstruction=found.reconstruction.reshape(hidden_states.shape).to(hidden_states),
            features=self._features(code, hidden_states.shape),
            router_logits=None if code.router is None else code.router[0],
            fvu=found.fvu,
            **{name: found.others.get(name, none) for name in _OTHER_LOSSES},
        )
        return output if return_dict or return_dict is None else output.to_tuple()

    @torch.no_grad()
    def batch_sums(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Sums over a part of a batch, which add up over parts: what `whole_batch` is made of.

        Args:
            hidden_states: [..., hidden_size].
            attention_mask: [...], as `forward` gets it.

        Raises:
            WidthError, ValueError: as `forward`.
        """
        check_width(hidden_states, len(self.b_dec))
        x, expert_ids, e = rows_of(self, hidden_states), None, self.config.num_experts
        mask = mask_of(hidden_states, attention_mask)
        mask = None if mask is None else mask.reshape(-1).to(self.device)
        counted = counted_of(outliers_among(self, x), mask)
        if e > 1:
            t, norm = self.config.num_experts_per_token, self.config.input_norm
            seen = x if norm == "none" else normalized(x, norm)[0]
            expert_ids = self.router(seen, self.b_router, self.input_scale, t)[2]
        return batch_sums(x, counted, expert_ids, e)

    def dead_features(self) -> Tensor:
        """[num_features] bool: not active on the last `dead_after_tokens` tokens of their expert.

        Counted in training (`num_tokens_since_fired`); of a released SAE, as training left it.
        """
        return self.num_tokens_since_fired >= self.config.dead_after_tokens

    def is_outlier(self, hidden_states: Tensor) -> Tensor:
        """Tokens whose norm is over `outlier_norm`: hidden_states [..., hidden_size] -> [...]."""
        norm: Tensor = hidden_states.float().norm(dim=-1)
        return norm > self.outlier_norm.to(hidden_states.device)

    def _features(self, code: Encoded, shape: torch.Size) -> SparseFeatures:
        """The code as the tokens came; shape [..., hidden_size] is theirs."""
        acts, ids = as_ordered(code.acts, code.inverse), as_ordered(code.ids, code.inverse)
        if code.unit is not None:
            acts = (acts * code.unit.scale).to(acts.dtype)
        return SparseFeatures(acts, ids, self.config.num_features).reshape(*shape[:-1])

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure what calibrated edits and checks rest on, and store it in the buffers.

        Sets feature_max (largest activation, LM units), feature_rate (share of tokens where
        active), residual_norm (median token norm, LM units) and statistics_tokens; for a batch_topk
        SAE also `threshold`, so that on average k features are active. The model is changed only
        when all batches have been read.

        Args:
            batches: residual streams [..., hidden_size] of the language model; outliers (see
                `outlier_norm`) are left out. For a batch_topk SAE they are read twice, so all are
                held in memory.

        Raises:
            ValueError: no tokens at all.
            WidthError: the last dimension is not `hidden_size`.
        """
        calibrate(self, batches)

    def attach(self, lm: nn.Module, at: int | str | None = None, **options: Any) -> Any:
        """Attach to a running language model; returns the `Session`. Options as of `attach`.

        Args:
            lm: the transformer, wrapped or not.
            at: layer, hookpoint or module path; the SAE's own `config.hookpoint` by default.

        Raises:
            AttachError: the SAE does not fit (width, base model, place), with `lm` untouched.
            HookpointError: no such place.
        """
        return SwitchSAE._open_session(lm, self, at=at, **options)


def _check_dictionary(features: SparseFeatures, num_features: int) -> None:
    if features.num_features != num_features:
        raise FeatureIdError(
            f"these are of a dictionary of {features.num_features} features, "
            f"and this SAE has {num_features}: they are another SAE's."
        )


register_checkpoint_layout(SwitchSAEConfig.model_type)
AutoConfig.register(SwitchSAEConfig.model_type, SwitchSAEConfig, exist_ok=True)
AutoModel.register(SwitchSAEConfig, SwitchSAE, exist_ok=True)
