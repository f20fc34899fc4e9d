import sys
from pathlib import Path

from hypothesis import settings

# Rewards named 'faulty_rewards:...' must import, here and in the pool's workers.
sys.path.insert(0, str(Path(__file__).parent))

# A busy machine is no failure of a property.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
