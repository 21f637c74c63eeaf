"""Every exception this package raises on purpose, so that one `except SwitchSAEError` catches them
all.

    SwitchSAEError
    ├── ConfigError          a configuration that contradicts itself (also a ValueError)
    ├── HookpointError       a place in the language model that is not there, or is ambiguous (also
    a LookupError) ├── FeatureIdError       a feature id outside the dictionary (also an IndexError)
    ├── AttachError          an SAE that does not fit the model or what is already attached (also a
    RuntimeError) │   ├── WidthError       residual width and SAE width differ (also a ValueError)
    │   └── BaseModelError   another language model than the SAE was trained on (also a ValueError)
    ├── EditError            an edit that means nothing or contradicts another (also a ValueError)
    └── NonFiniteError       NaN or infinity in the residual stream (also an ArithmeticError)

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


class NonFiniteError(SwitchSAEError, ArithmeticError):
    """NaN or infinity where a residual stream was expected."""
