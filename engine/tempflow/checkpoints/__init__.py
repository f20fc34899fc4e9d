"""Checkpoints: saving, sealing, finding and reading them."""
