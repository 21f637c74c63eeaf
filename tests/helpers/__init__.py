"""What tests share: tiny models, SAEs, stores, a Hub on loopback."""
