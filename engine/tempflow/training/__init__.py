"""Training: the DeepSpeed runtime, checkpoints and the loop that uses them."""
