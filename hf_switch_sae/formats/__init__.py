"""Other projects' checkpoints, read and written: one file a format.

    sae = SwitchSAE.from_pretrained("EleutherAI/sae-pythia-70m-32k", subfolder="layers.3")
    convert("google/gemma-scope-2b-pt-res", "folder", subfolder="layer_20/width_16k/average_l0_71")
    export(sae, "folder", format="saelens")

Room   A file a format, each with NAME, `recognizes`, `read` and, if we also write it, `write`.
       `registry.py` lists them: to add a format, write its file and add it there.
"""

from hf_switch_sae.formats.checkpoint import Given
from hf_switch_sae.formats.conversion import Conversion, convert, export
from hf_switch_sae.formats.parity import Parity, parity
from hf_switch_sae.formats.registry import EXPORTS, FORMATS

__all__ = ["EXPORTS", "FORMATS", "Conversion", "Given", "Parity", "convert", "export", "parity"]
