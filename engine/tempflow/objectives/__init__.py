"""Objectives: what an update minimizes, given states and the advantages of their children."""
