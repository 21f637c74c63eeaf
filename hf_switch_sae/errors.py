"""Every exception this package raises on purpose; one `except SwitchSAEError` catches them all.

    SwitchSAEError
    ├── ConfigError         a configuration that contradicts itself (and ValueError)
    ├── HookpointError      a place in the model that is not there, or ambiguous (and LookupError)
    ├── FeatureIdError      a feature id outside of the dictionary (and IndexError)
    ├── AttachError         an SAE that does not fit model, place or session (and RuntimeError)
    │   ├── WidthError      residual width and SAE width differ (and ValueError)
    │   └── BaseModelError  not the language model the SAE was trained on (and ValueError)
    ├── EditError           an edit that means nothing, or contradicts another (and ValueError)
    ├── ConversionError     a checkpoint that can't be taken over or handed on (and ValueError)
    ├── HubError            what the Hugging Face Hub answered, said plainly (and OSError)
    ├── NonFiniteError      NaN or infinity in the residual stream (and ArithmeticError)
    ├── BackendError        a compute backend that does not exist, or declines (and RuntimeError)
    ├── StoreError          a store that is damaged, foreign or full (and RuntimeError)
    ├── TextError           documents that can't be read as text (and ValueError)
    └── TrainingError       a training run that can't begin or go on (and RuntimeError)

Each message says what was asked, what is there, and what to do. An error is raised before anything
was changed.
"""


class SwitchSAEError(Exception):
    """Root of the tree."""


class ConfigError(SwitchSAEError, ValueError):
    """A configuration that contradicts itself, found when it is built."""


class HookpointError(SwitchSAEError, LookupError):
    """No such place in the language model, or several that fit equally well."""


class FeatureIdError(SwitchSAEError, IndexError):
    """A feature id outside 0 to num_features - 1."""


class AttachError(SwitchSAEError, RuntimeError):
    """The SAE does not fit the model, or what is already attached to it."""


class WidthError(AttachError, ValueError):
    """The residual stream is not as wide as the SAE expects."""


class BaseModelError(AttachError, ValueError):
    """The language model is not the one the SAE was trained on."""


class EditError(SwitchSAEError, ValueError):
    """An edit that means nothing as written, or contradicts another live one."""


class ConversionError(SwitchSAEError, ValueError):
    """A checkpoint of another format that can't be taken over exactly, or an SAE it can't hold."""


class HubError(SwitchSAEError, OSError):
    """The Hugging Face Hub refused, failed or can't be reached."""


class NonFiniteError(SwitchSAEError, ArithmeticError):
    """NaN or infinity where a residual stream was expected."""


class BackendError(SwitchSAEError, RuntimeError):
    """No such compute backend, or one that can't work on these tensors."""


class StoreError(SwitchSAEError, RuntimeError):
    """A store of recorded features that is damaged, of something else, or can't be written."""


class TextError(SwitchSAEError, ValueError):
    """Documents that are not there, or can't be read as text."""


class TrainingError(SwitchSAEError, RuntimeError):
    """A training run that can't begin, go on, or write its checkpoint."""
