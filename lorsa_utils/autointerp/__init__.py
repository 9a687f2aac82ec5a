"""Explanations of units and how well they predict activations (notebook 07)."""
