"""How an SAE's features lie to each other: duplicates, similarity of experts, maps."""

from hf_switch_sae.geometry.measure import measure_geometry
from hf_switch_sae.geometry.result import Geometry

__all__ = ["Geometry", "measure_geometry"]
