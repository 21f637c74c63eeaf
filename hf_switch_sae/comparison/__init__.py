"""SAEs of one hookpoint, trained and measured on the same rows -> figures side by side."""

from hf_switch_sae.comparison.plan import SETS, Planned, plan, switch_set
from hf_switch_sae.comparison.report import compare

__all__ = ["SETS", "Planned", "compare", "plan", "switch_set"]
