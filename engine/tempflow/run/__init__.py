"""A run seen from outside: its directory, metrics, console, evaluations, samples and report."""
