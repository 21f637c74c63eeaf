"""SAEs attached to a running language model: read, edit, record."""
