"""Prompts: reading them from files and datasets, drawing them for iterations, and skipping those
whose rewards do not differ."""
