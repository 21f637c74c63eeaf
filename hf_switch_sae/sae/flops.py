"""A config -> floating-point operations per token of a forward pass, and the number of parameters.

    router    2 * E * d             none with one expert
    encoder   2 * t * m * d         the routed experts alone; t experts a token
    decoder   2 * k * d             the active features alone

A multiplication with its addition counts as two. Choosing the k largest, softmax, sorting tokens by
expert, biases and scales are not counted: none of them grows with features times width.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.sae.config import SwitchSAEConfig

__all__ = ["Flops", "flops_per_token", "parameter_count"]


class Flops(NamedTuple):
    """Operations of one token's forward pass."""

    router: int
    encoder: int
    decoder: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return sum(self)

    def to_dict(self) -> dict[str, int]:
        """JSON-able, with the total."""
        return {**self._asdict(), "total": self.total}


def flops_per_token(config: SwitchSAEConfig, active: float | None = None) -> Flops:
    """What encoding and decoding one token takes.

    Args:
        config: of the SAE.
        active: how many features are decoded, such as a measured l0; by default the config's `k`.

    Raises:
        ConfigError: neither is there.
    """
    active = config.k if active is None else active
    if active is None:
        raise ConfigError(
            f"an SAE of activation={config.activation!r} without k has no fixed number of active "
            "features: give active, such as its l0."
        )
    width, experts = config.hidden_size, config.num_experts
    routed = config.num_experts_per_token * config.features_per_expert
    router = 2 * experts * width if experts > 1 else 0
    return Flops(router, 2 * routed * width, round(2 * active * width))


def parameter_count(config: SwitchSAEConfig) -> int:
    """Parameters of encoder, decoder, router and biases; statistics don't count."""
    width, features = config.hidden_size, config.num_features
    router = width * config.num_experts + width if config.num_experts > 1 else 0
    return 2 * features * width + width + router + features * config.encoder_bias
