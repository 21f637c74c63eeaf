"""What an SAE is, in numbers and names: keywords or config.json -> a checked `SwitchSAEConfig`.

Everything inference needs that is not a tensor lives here, so nothing is ever guessed at load:
shape, activation rule, router, the place in the language model, and the identity of that language
model.

Beware `PreTrainedConfig` keeps unknown keywords silently, and `strict` wraps what a validator
       raises; both are undone here, so a slip (`num_expert=8`) is a ConfigError when the config is
       built. `strict` reads annotations as objects: no `from __future__ import annotations` here.
"""

import difflib
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.sae.input_norm import InputNorm

Activation = Literal["topk", "batch_topk", "jumprelu", "relu"]

# PreTrainedConfig reads these from a config.json although it has no fields for them.
_HOST_KEYWORDS = {
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "name_or_path",
    "_name_or_path",
    "torch_dtype",
    "num_labels",
    "_commit_hash",
    "model_type",
    "auto_map",
    "quantization_config",
    "tags",
    "transformers_weights",
    "distributed_config",
    "fusion_config",
}

_Config = TypeVar("_Config", bound=type[Any])


def _with_plain_errors(cls: _Config) -> _Config:
    """Turn a config class's StrictDataclassErrors into ConfigErrors that carry the first cause."""

    def plain(method: Callable[..., None]) -> Callable[..., None]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            # a field given under both its names would silently lose one of them
            for alias, name in cls.attribute_map.items():
                if kwargs.get(alias, kwargs.get(name)) != kwargs.get(name, kwargs.get(alias)):
                    raise ConfigError(
                        f"{alias}={kwargs[alias]} contradicts {name}={kwargs[name]}: "
                        "they are one field."
                    )
            try:
                method(self, *args, **kwargs)
            except StrictDataclassError as err:
                raise ConfigError(f"{cls.__name__}: {err.__cause__ or err}") from None

        return call

    cls.__init__ = plain(cls.__init__)
    cls.__setattr__ = plain(cls.__setattr__)
    cls.validate = plain(cls.validate)
    return cls


@_with_plain_errors
@strict
class SwitchSAEConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a `SwitchSAE`; all fields are keywords, checked when it is built.

    `num_experts=1` is a plain SAE. Raises `ConfigError` for an unknown keyword, a wrong type, or
    numbers that contradict each other (`k` above `features_per_expert`, `num_features` not a
    multiple of `num_experts`, ...).

    Source: Mudide et al. 2024, arXiv:2410.08201.
    """

    model_type = "switch_sae"
    attribute_map: ClassVar[dict[str, str]] = {"d_in": "hidden_size", "d_sae": "num_features"}

    hidden_size: int = 768
    """Width of the residual stream, as in the LM's own config; also readable as `d_in`."""

    num_features: int = 24_576
    """Features over all experts together, a multiple of `num_experts`; also readable as `d_sae`."""

    num_experts: int = 32
    """Experts the features are split over, in equal contiguous parts; 1: a plain SAE, no router."""

    num_experts_per_token: int = 1
    """Experts each token is encoded by, with one joint top-k over theirs; 1 is the Switch SAE."""

    k: int | None = 32
    """Features kept per token (`batch_topk`: on average over a training batch).

    None keeps as many as are active; only `relu` and `jumprelu` allow it.
    """

    activation: Activation = "topk"
    """How the active features of a token are chosen among the routed ones.

    topk: the k largest.
    batch_topk: in training the k * num_tokens largest of the batch, else those above `threshold`.
    jumprelu: those above their own `threshold`; of them at most k, if k is given.
    relu: all that are positive; of them at most k, if k is given.
    """

    input_norm: InputNorm = "none"
    """How each token is normalized before the router and the encoder see it; see `input_norm.py`.

    layer_norm: less its own mean, over its own standard deviation. constant_norm: to one length.
    """

    encoder_bias: bool = False
    """Whether there is a `b_enc` [num_experts, features_per_expert]; the paper has none."""

    subtract_b_dec: bool = True
    """Whether the encoder sees the residual less `b_dec` (the paper) or the residual as it is."""

    apply_router_probs: bool = True
    """Whether an activation includes its expert's router probability; no effect with one expert.

    Without it (the `heaviside` of the paper's code) the router learns nothing from the
    reconstruction.
    """

    norm_topk_prob: bool = False
    """Whether the probabilities of a token's chosen experts are divided by their sum.

    Needs `num_experts_per_token` >= 2, as one expert alone would always have weight 1.
    """

    hookpoint: str | None = None
    """Where it reads and writes: `layers.<i>.resid_post`, `layers.<i>.resid_pre`, a module path."""

    base_model: str | None = None
    """Hub id of the language model it was trained on."""

    base_model_revision: str | None = None
    """Commit of `base_model`."""

    base_model_fingerprint: dict[str, Any] | None = None
    """What `fingerprint(lm)` said of it: recognizes a local copy, tells a fine-tune apart."""

    source: dict[str, Any] | None = None
    """Where these weights came from: `repo` or `folder`, `revision` (the commit), `path`.

    A converted checkpoint adds its `format` and what its files say of its origin. Once the SAE is
    published and loaded from its new address, `source` names that address, and what was here before
    moves to its `taken_from`.
    """

    metrics: dict[str, Any] | None = None
    """Figures at its release, at least `fvu` and `l0`; `session.preflight` compares with them."""

    fvu_loss_coef: float | int = 1.0
    """Weight of the reconstruction error (as FVU of the batch) in `loss`."""

    router_aux_loss_coef: float | int = 0.16
    """Weight of the load balance num_experts * sum(f_e * P_e) in `loss`; relative to FVU.

    So it is free of scale: 0.16 is the published 3 * hidden_size on GPT-2's activations.
    """

    router_z_loss_coef: float | int = 0.0
    """Weight of the router's z-loss, mean(logsumexp(router_logits) ** 2), in `loss`."""

    router_best_expert_loss_coef: float | int = 0.0
    """Weight, in `loss`, of the router's cross entropy to the experts that reconstruct best.

    In training all experts are tried on every num_experts-th token, which costs as much as encoding
    the batch once more. That tells the router how well other experts would have done, which the
    weight of its own probability (`apply_router_probs`) can't.
    """

    router_best_expert_temperature: float | int = 0.05
    """How much better, as a share of the error, an expert must be to be the router's target."""

    second_expert_loss_coef: float | int = 0.0
    """Weight, in `loss`, of the error that each token's second choice of expert makes alone.

    In training every token is then encoded and decoded by a second expert too, so a step takes
    about half as long again. In return experts learn the tokens at their borders, and the
    best-expert loss also compares the first two choices of every token. Needs
    `num_experts_per_token=1`.
    """

    l1_loss_coef: float | int = 0.0
    """Weight, in `loss`, of how much is active; only for `relu` and `jumprelu`, without `k`.

    The mean over tokens of sum_j acts[j] * |W_dec[ids[j]]|, as a share of a scaled token's length,
    sqrt(hidden_size) / input_scale. So it depends neither on the LM's scale nor on how encoder and
    decoder share a feature's length.
    """

    auxk_loss_coef: float | int = 0.0
    """Weight of AuxK in `loss`: the share of the error that dead features leave unexplained."""

    k_aux: int | None = None
    """Dead features per token in AuxK, of the token's own experts; None: hidden_size // 2.

    Never more than the expert with the most dead features has.
    """

    dead_after_tokens: int = 100_000
    """Tokens routed to its expert without firing after which a feature is dead.

    With 8 balanced experts that is 8 times as many tokens of training.
    """

    initializer_range: float | int | None = None
    """Bound of the uniform start of encoder and router; None: 1 / sqrt(hidden_size)."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {f.name for f in fields(self)} | set(self.attribute_map) | _HOST_KEYWORDS
        # PreTrainedConfig would keep a misspelled name as an attribute that nobody reads
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {close[0]!r}?"
                    if close
                    else "if a newer version wrote it, update hf-switch-sae."
                )
                raise ConfigError(f"SwitchSAEConfig has no field {name!r}; {hint}")
        # by assignment, so that the alias's value is checked as the field's
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; keywords replace fields, the result is checked whole."""
        result = super().from_dict(config_dict, **kwargs)
        # keywords are set one by one after the init, so relations are checked again
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    def validate_experts(self) -> None:
        """Sizes are positive, experts divide the features, a token's experts exist."""
        for name in ("hidden_size", "num_features", "num_experts", "num_experts_per_token"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_features % self.num_experts:
            below = self.num_features // self.num_experts * self.num_experts
            raise ConfigError(
                f"num_features={self.num_features} is not a multiple of "
                f"num_experts={self.num_experts}; "
                f"the nearest are {below} and {below + self.num_experts}."
            )
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_token={self.num_experts_per_token} is more than "
                f"num_experts={self.num_experts}."
            )
        # divided by its own sum, one expert's weight has no gradient for the router
        if self.norm_topk_prob and self.num_experts_per_token == 1:
            raise ConfigError(
                "norm_topk_prob=True needs num_experts_per_token >= 2: the one expert's weight "
                "would always be 1 and the router would learn nothing. "
                "Use apply_router_probs=False if that is what you want."
            )

    def validate_k(self) -> None:
        """A token's experts hold k features; without k the activation rule can do without."""
        # k is chosen among what a token's experts hold, not among all features
        routed = self.features_per_expert * self.num_experts_per_token
        if self.k is None:
            if self.activation in ("topk", "batch_topk"):
                raise ConfigError(
                    f"activation={self.activation!r} needs k; "
                    "only 'relu' and 'jumprelu' go without."
                )
        elif not 1 <= self.k <= routed:
            raise ConfigError(
                f"k={self.k} is outside 1 to {routed}: each token is encoded by "
                f"{self.num_experts_per_token} of {self.num_experts} experts "
                f"with {self.features_per_expert} features each."
            )

    def validate_losses(self) -> None:
        """Coefficients are not negative, and each loss fits the rest of the config."""
        if self.l1_loss_coef > 0 and (
            self.k is not None or self.activation not in ("relu", "jumprelu")
        ):
            raise ConfigError(
                f"l1_loss_coef={self.l1_loss_coef} makes fewer features active, and with "
                f"activation={self.activation!r} k={self.k} says how many are: set "
                "activation='relu' and k=None, or l1_loss_coef=0."
            )
        if self.dead_after_tokens < 1 or (self.k_aux is not None and self.k_aux < 1):
            raise ConfigError(
                f"dead_after_tokens={self.dead_after_tokens} and k_aux={self.k_aux} "
                "must be at least 1; auxk_loss_coef=0 is what turns AuxK off."
            )
        # written so that nan is refused too
        if not self.router_best_expert_temperature > 0:
            raise ConfigError(
                f"router_best_expert_temperature={self.router_best_expert_temperature} must be "
                "above 0; router_best_expert_loss_coef=0 is what turns that loss off."
            )
        if self.second_expert_loss_coef and self.num_experts_per_token > 1:
            raise ConfigError(
                f"second_expert_loss_coef={self.second_expert_loss_coef} is of a token's second "
                f"choice alone, and with num_experts_per_token={self.num_experts_per_token} that "
                "is one of its experts already: set second_expert_loss_coef=0."
            )
        for name in (field.name for field in fields(self) if field.name.endswith("_loss_coef")):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")

    @property
    def features_per_expert(self) -> int:
        """Features of one expert, m = num_features / num_experts."""
        return self.num_features // self.num_experts
