"""An SAE and held-out text -> figures: reconstruction, sparsity, what predictions lose."""
