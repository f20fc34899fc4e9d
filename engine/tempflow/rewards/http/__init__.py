"""Rewards over HTTP: the messages (`protocol`), the client in the training run (`client`) and the
reward server (`server`, `batching`).

Only `server` needs FastAPI, so a training run does not.
"""
