"""The command lines: train, evaluate, sample, export, merge, refine, report and reward_server.

Each module reads its options and calls the package.
"""
