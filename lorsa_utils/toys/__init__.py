"""A two-layer Transformer on a language with known rules (notebook 14)."""
