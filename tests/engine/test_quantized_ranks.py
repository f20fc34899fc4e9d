"""A base in 4 or 8 bits, and AdamW8bit, on two ranks and on one: they train alike, and each takes
up what the other saved or says why it cannot."""

import pytest
import torch
from engine_cases import HERE
from quantized_cases import RESUMED, RUNS, toy, trained
from run_cases import ranks
from safetensors.torch import load_file
from test_elastic import BF16, ROUNDING, same

from tempflow.errors import UserError
from tempflow.training import distributed

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.cpu]  # two ranks on any machine

# The weights' way. At stage 3 the blocks of 256 moments that share a scale lie elsewhere in the
# slices of two ranks than in those of one, so the moments are rounded otherwise.
BLOCKS = 3e-2


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    distributed.init_distributed()
    folder = tmp_path_factory.mktemp("quantized")
    done = ranks(2, HERE / "quantized_cases.py", folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def apart(one: dict, other: dict, start: dict | None = None) -> float:
    """Distance of all tensors but averages, relative to their norm or to their way from `start`."""
    names = [name for name in other if ":" not in name and name != "norms"]
    whole = torch.cat([(other[n] - start[n] if start else other[n]).flatten() for n in names])
    return (torch.cat([(one[n] - other[n]).flatten() for n in names]).norm() / whole.norm()).item()


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_does(two_ranks, name):
    held = load_file(two_ranks / name / "held.safetensors")
    one, start, alone = trained(name)
    if name == "adam-zero3":
        assert apart(held, alone, start) < BLOCKS
        assert held["norms"][0] == pytest.approx(alone["norms"][0].item(), rel=ROUNDING)
    else:
        tolerance = BF16 if "bf16" in name else ROUNDING
        assert apart(held, alone) < tolerance
        assert held["norms"].tolist() == pytest.approx(alone["norms"].tolist(), rel=tolerance)
    assert apart(start, alone) > 1e-3, "the updates do something"
    one.close()


@pytest.mark.parametrize("name", RUNS)
def test_one_rank_takes_up_what_two_saved(two_ranks, name):
    """To the bit, but for 8-bit moments in slices, which nothing converts."""
    one, held = toy(name, seed=1), load_file(two_ranks / name / "held.safetensors")
    if name == "adam-zero3":
        with pytest.raises(UserError, match="deepspeed.optimizer is AdamW8bit"):
            one.restore(two_ranks / name)
    else:
        one.restore(two_ranks / name)
        assert same(one.held(), {n: t for n, t in held.items() if n != "norms"})
    one.close()


@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_go_on_to_the_bit(two_ranks, name):
    after, again = (load_file(two_ranks / name / f"{n}.safetensors") for n in ("after", "again"))
    assert same(again, after)
