"""Training: text -> a language model's residual streams -> shuffled rows -> a Switch SAE."""

from hf_switch_sae.activations.cache_reader import CachedActivations
from hf_switch_sae.activations.cache_writer import cache_activations
from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.activations.live import LiveActivations
from hf_switch_sae.activations.policy import TokenPolicy
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.activations.stored import TensorActivations
from hf_switch_sae.evaluation.calibrate import calibrate
from hf_switch_sae.evaluation.evaluate import evaluate
from hf_switch_sae.training.arguments import SAE_PRESETS, SwitchSAETrainingArguments
from hf_switch_sae.training.pipeline import TrainedRelease, train_release
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
    "TrainedRelease",
    "cache_activations",
    "calibrate",
    "evaluate",
    "train_release",
]
