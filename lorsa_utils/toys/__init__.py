"""Small worlds whose true units are known (notebooks 00 and 08)."""
