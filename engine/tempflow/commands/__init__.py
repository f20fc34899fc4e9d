"""The command lines: train, evaluate, sample, export and reward_server. Each module reads its options and calls the package."""
