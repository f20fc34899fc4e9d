import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Rewards named 'faulty_rewards:...' must import, here and in the pool's workers; recipes/ holds one
# too.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "recipes")]

# A busy machine is no failure of a property.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders, and the tensors or modules they hold."""
    from reward_models import save_models

    return save_models(tmp_path_factory.mktemp)
