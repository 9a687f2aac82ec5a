"""What a reader looks at: figures, head pages, the explorer (notebooks 06 and 13)."""
