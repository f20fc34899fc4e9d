"""Rewards over HTTP: the messages (`protocol`), the training side (`client`) and the reward server
(`server`, `batching`).

Only `server` needs FastAPI.
"""
