"""A small world whose rules are known: the two-layer Transformer of notebook 14."""
