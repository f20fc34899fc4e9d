"""The command lines: train, evaluate, sample, export, merge, refine, report and reward_server.

Each module reads its options and calls the package. torch and the model libraries are imported
inside the functions that use them: --help and a wrong option answer at once, and
`cli.quiet_libraries` sets the environment variables that these libraries read when they load.
"""
