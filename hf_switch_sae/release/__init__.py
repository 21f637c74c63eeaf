"""A folder of SAEs <-> a repository on the Hub, with its card.

Room   `push.py` publishes a release or a recipe, `pull.py` fetches them, `card.py` writes the card
       from what `facts.py` reads.
"""

from hf_switch_sae.release.card import render_card
from hf_switch_sae.release.pull import pull_recipe
from hf_switch_sae.release.push import push_recipe

__all__ = ["pull_recipe", "push_recipe", "render_card"]
