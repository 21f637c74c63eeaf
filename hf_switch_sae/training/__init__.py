"""Training: text -> a language model's residual streams -> shuffled rows -> a Switch SAE."""

from hf_switch_sae.training.activations import Activations
from hf_switch_sae.training.arguments import SAE_PRESETS, SwitchSAETrainingArguments
from hf_switch_sae.training.cache import cache_activations
from hf_switch_sae.training.cached import CachedActivations
from hf_switch_sae.training.evaluation import evaluate
from hf_switch_sae.training.finish import calibrate
from hf_switch_sae.training.harvest import ActivationSettings
from hf_switch_sae.training.live import LiveActivations
from hf_switch_sae.training.policy import TokenPolicy
from hf_switch_sae.training.stored import TensorActivations
from hf_switch_sae.training.trainer import SwitchSAETrainer

__all__ = [
    "SAE_PRESETS",
    "ActivationSettings",
    "Activations",
    "CachedActivations",
    "LiveActivations",
    "SwitchSAETrainer",
    "SwitchSAETrainingArguments",
    "TensorActivations",
    "TokenPolicy",
    "cache_activations",
    "calibrate",
    "evaluate",
]
