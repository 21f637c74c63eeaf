"""Switch Sparse Autoencoders on running Hugging Face models: show, steer, clamp, ablate."""

from typing import TYPE_CHECKING, Any

from hf_switch_sae.edits.kinds import Ablate, Clamp, Patch, Scale, Steer
from hf_switch_sae.edits.recipe import Recipe
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
from hf_switch_sae.formats.conversion import convert, export
from hf_switch_sae.formats.inspection import inspect
from hf_switch_sae.formats.loading import load_all, load_foreign, pin_revision
from hf_switch_sae.formats.steering_files import export_recipe
from hf_switch_sae.lm.fingerprint import fingerprint
from hf_switch_sae.lm.hookpoints import ResidualBlocks, find_residual_blocks
from hf_switch_sae.lm.hooks import ResidualHandle, hook_residual
from hf_switch_sae.lm.residuals import partial_forward, residuals
from hf_switch_sae.ops import explain_backends, use_backend
from hf_switch_sae.release.pull import pull
from hf_switch_sae.release.push import push
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.optim import SwitchSAEAdam
from hf_switch_sae.sae.output import SwitchSAEOutput
from hf_switch_sae.sessions.attach import attach, detach, status
from hf_switch_sae.sessions.preflight import Preflight
from hf_switch_sae.sessions.record_corpus import record
from hf_switch_sae.sessions.session import AttachedSAE, Session
from hf_switch_sae.store import FeatureStore

# What SwitchSAE is handed from higher floors, here and nowhere else: `sae.attach(lm)` opens a
# session, `from_pretrained` takes over foreign checkpoints and notes the commit it loaded.
SwitchSAE._open_session = attach
SwitchSAE._load_foreign = load_foreign
SwitchSAE._pin_revision = pin_revision

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
