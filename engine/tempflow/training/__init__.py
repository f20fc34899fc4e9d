"""Training: the DeepSpeed engine, the rollouts, the updates, and the loop around them."""
