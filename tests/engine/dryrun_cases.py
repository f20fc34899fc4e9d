"""What the tests of the dry run share."""

from tempflow.models.hub import CARDS

CARD = CARDS / "flux-dev"


def items(result) -> dict[str, int]:
    """Bytes by the first words of their names."""
    memory = result.memory
    return {
        item.name.removeprefix("training engine: ").split(":")[0]: item.bytes
        for item in [*memory.resident, *memory.moments, *memory.host]
    }
