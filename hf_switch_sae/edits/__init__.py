"""Edits of features: what they are, and what they add to the residual stream.

Room   `kinds.py` has the five edits, `conflicts.py` refuses those that contradict each other,
       `deltas.py` turns them into a change of the stream, `recipe.py` saves and loads them.
"""

from hf_switch_sae.edits.kinds import Ablate, Clamp, Edit, Patch, Scale, Steer
from hf_switch_sae.edits.recipe import Recipe

__all__ = ["Ablate", "Clamp", "Edit", "Patch", "Recipe", "Scale", "Steer"]
