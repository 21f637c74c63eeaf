"""Figures, each as SVG and PNG: SAEs side by side, an SAE's geometry, an SAE and its training.

Room   `comparison`, `geometry` and `sae` draw; `style` holds the look that they share.
How    Figures can be read in print and without colors: what a color says, a marker, a line style or
       a number says too. The same data gives the same SVG, byte for byte.
"""

from hf_switch_sae.plots.comparison import draw_comparison
from hf_switch_sae.plots.geometry import draw_geometry
from hf_switch_sae.plots.sae import draw_sae
from hf_switch_sae.plots.style import can_draw

__all__ = ["can_draw", "draw_comparison", "draw_geometry", "draw_sae"]
