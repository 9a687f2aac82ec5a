"""Lorsa: low-rank sparse attention, from activations to readable heads (arXiv 2504.20938)."""

__version__ = "0.1.0"
