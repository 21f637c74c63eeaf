"""Text and a language model -> rows of activations, for training and evaluation.

Room   `interface.py` says what every source of rows offers; `live.py`, `stored.py` and
       `cache_reader.py` are the sources. `harvest.py` runs the language model for them.
"""
