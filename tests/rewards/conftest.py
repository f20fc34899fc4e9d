import sys
from pathlib import Path

from hypothesis import settings

# Rewards named 'faulty_rewards:...' must import, here and in the pool's workers; recipes/ holds one too.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "recipes")]

# A busy machine is no failure of a property.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
