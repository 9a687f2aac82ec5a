"""What heads do: units behind one interface, prompts and families, surveys of text, origins (notebooks 04 and 05)."""
