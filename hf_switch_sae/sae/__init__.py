"""The Switch SAE itself: tokens -> SparseFeatures -> reconstruction, and its losses."""
