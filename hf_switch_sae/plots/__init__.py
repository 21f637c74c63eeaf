"""Figures -> SVG and PNG: comparisons of SAEs, an SAE's geometry, an SAE and its training.

One look for all (`style`), readable in print and without colors: whatever a color says, a marker, a
line's style or a number says too. The same data gives the same SVG, byte for byte.
"""

from hf_switch_sae.plots.comparison import draw_comparison
from hf_switch_sae.plots.geometry import draw_geometry
from hf_switch_sae.plots.sae import draw_sae
from hf_switch_sae.plots.style import can_draw

__all__ = ["can_draw", "draw_comparison", "draw_geometry", "draw_sae"]
