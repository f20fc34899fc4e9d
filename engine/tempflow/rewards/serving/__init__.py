"""The reward server's inside: worker processes behind a queue that batches across requests, and the web application.

`engine/reward_server.py` runs it. Only `app` needs FastAPI, and is therefore imported by its own name.
"""

from tempflow.rewards.serving.batching import Batcher, ScoringFailed

__all__ = ["Batcher", "ScoringFailed"]
