"""Prompts: reading them, the order in which they are drawn, and which are passed over for a
while."""
