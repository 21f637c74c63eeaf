"""What is known of a language model: its blocks, streams, positions and identity; knows no SAE."""
