"""Text and a language model -> rows of activations, for training and evaluation.

Room   `interface.py` says what every source of rows offers. The sources are `live.py`, `stored.py`
       and `cache_reader.py`; `harvest.py` runs the language model for them.
"""
