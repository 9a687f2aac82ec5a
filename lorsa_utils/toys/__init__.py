"""Small worlds whose true units are known."""
