"""Training: text -> a language model's residual streams -> shuffled rows -> a Switch SAE."""
