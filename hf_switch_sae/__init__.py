"""Switch Sparse Autoencoders on running Hugging Face models: show, steer, clamp, ablate."""

from typing import TYPE_CHECKING, Any

from hf_switch_sae.attach import ResidualHandle, attach, detach, hook_residual, status
from hf_switch_sae.base_model import fingerprint
from hf_switch_sae.config import SwitchSAEConfig
from hf_switch_sae.convert import convert, export
from hf_switch_sae.edits import Ablate, Clamp, Patch, Scale, Steer
from hf_switch_sae.errors import (
    AttachError,
    BackendError,
    BaseModelError,
    ConfigError,
    ConversionError,
    EditError,
    FeatureIdError,
    HookpointError,
    HubError,
    NonFiniteError,
    StoreError,
    SwitchSAEError,
    TextError,
    TrainingError,
    WidthError,
)
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.hookpoints import ResidualBlocks, find_residual_blocks
from hf_switch_sae.hub import load_all, pull, push
from hf_switch_sae.inspection import inspect
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.ops import explain_backends, use_backend
from hf_switch_sae.optim import SwitchSAEAdam
from hf_switch_sae.output import SwitchSAEOutput
from hf_switch_sae.recipe import Recipe
from hf_switch_sae.record import record
from hf_switch_sae.residuals import partial_forward, residuals
from hf_switch_sae.session import AttachedSAE, Preflight, Session
from hf_switch_sae.steering_files import export_recipe
from hf_switch_sae.store import FeatureStore

if TYPE_CHECKING:
    from hf_switch_sae.comparison import compare
    from hf_switch_sae.training import SwitchSAETrainer, SwitchSAETrainingArguments

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "AttachError",
    "AttachedSAE",
    "BackendError",
    "BaseModelError",
    "Clamp",
    "ConfigError",
    "ConversionError",
    "EditError",
    "FeatureIdError",
    "FeatureStore",
    "HookpointError",
    "HubError",
    "NonFiniteError",
    "Patch",
    "Preflight",
    "Recipe",
    "ResidualBlocks",
    "ResidualHandle",
    "Scale",
    "Session",
    "SparseFeatures",
    "Steer",
    "StoreError",
    "SwitchSAE",
    "SwitchSAEAdam",
    "SwitchSAEConfig",
    "SwitchSAEError",
    "SwitchSAEOutput",
    "SwitchSAETrainer",
    "SwitchSAETrainingArguments",
    "TextError",
    "TrainingError",
    "WidthError",
    "attach",
    "compare",
    "convert",
    "detach",
    "explain_backends",
    "export",
    "export_recipe",
    "find_residual_blocks",
    "fingerprint",
    "hook_residual",
    "inspect",
    "load_all",
    "partial_forward",
    "pull",
    "push",
    "record",
    "residuals",
    "status",
    "use_backend",
]

_LATE = ("SwitchSAETrainer", "SwitchSAETrainingArguments", "compare")


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, and attaching an SAE needs none of it
    if name in _LATE:
        from hf_switch_sae import comparison, training

        return getattr(comparison if name == "compare" else training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
