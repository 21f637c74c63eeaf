"""Switch Sparse Autoencoders on running Hugging Face models: show, steer, clamp, ablate."""

from hf_switch_sae.attach import ResidualHandle, attach, hook_residual, status
from hf_switch_sae.base_model import fingerprint
from hf_switch_sae.config import SwitchSAEConfig
from hf_switch_sae.edits import Ablate, Clamp, Patch, Scale, Steer
from hf_switch_sae.errors import (
    AttachError,
    BaseModelError,
    ConfigError,
    EditError,
    FeatureIdError,
    HookpointError,
    NonFiniteError,
    StoreError,
    SwitchSAEError,
    TextError,
    WidthError,
)
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.hookpoints import ResidualBlocks, find_residual_blocks
from hf_switch_sae.model import SwitchSAE, SwitchSAEOutput
from hf_switch_sae.recipe import Recipe
from hf_switch_sae.record import record
from hf_switch_sae.residuals import partial_forward, residuals
from hf_switch_sae.session import AttachedSAE, Preflight, Session
from hf_switch_sae.store import FeatureStore

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "AttachError",
    "AttachedSAE",
    "BaseModelError",
    "Clamp",
    "ConfigError",
    "EditError",
    "FeatureIdError",
    "FeatureStore",
    "HookpointError",
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
    "SwitchSAEConfig",
    "SwitchSAEError",
    "SwitchSAEOutput",
    "TextError",
    "WidthError",
    "attach",
    "find_residual_blocks",
    "fingerprint",
    "hook_residual",
    "partial_forward",
    "record",
    "residuals",
    "status",
]
