"""What heads do: units behind one interface, head families, prompts, surveys of text, where heads come from (notebooks 04 and 05)."""
