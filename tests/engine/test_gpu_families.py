"""Rollouts of every family as CUDA graphs: through the real collector, equal to the same batches
run eagerly.

On the CPU the capture is stood in for, so that the comparison itself has run on any machine.
"""

import pytest
import torch
from engine_cases import quiet_pool, small_config
from family_cases import FAMILIES, SIBLINGS
from test_graphs import Recorded, cache_of

from tempflow.data.prompts import load_prompts
from tempflow.models import load_policy
from tempflow.models.embeddings import EmbeddingCache
from tempflow.sampling.graphs import Captured, CudaCapture
from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out
from tempflow.training.session import assemble

pytestmark = pytest.mark.usefixtures("small_condition_images")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def eager(function, inputs):
    """A capture that runs the function at every replay: the same batches as of a graph, padded rows
    included."""
    static = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = tuple(t.clone() for t in function(**static))

    def replay():
        for buffer, value in zip(outputs, function(**static), strict=True):
            buffer.copy_(value)

    return Captured(static, outputs, replay, 1)


def rolled(session):
    """The first iteration of two prompts."""
    found = roll_out(session, plan_iteration(session, [0, 1], 0), 0)
    gather_rewards(session, found)
    return found


def check_graphs(folder, files, family, dtype, device, capture):
    """Two rollouts, the second with weights changed in place: the same states and children as
    eagerly, one capture per size."""
    size, folder, text = family.size(32, 32), str(folder), family.text(20)
    policy, files = (
        load_policy(folder, dtype=dtype, device=device, max_sequence_length=text),
        family.prompt_files(files, size),
    )
    policy.size = size
    config = small_config(
        model={"path": folder, "dtype": dtype, "max_sequence_length": text},
        data={"prompts_per_iteration": 2, **files},
        rollout={
            "height": 32,
            "width": 32,
            "num_steps": 4,
            "plan": {"branch_steps": [0, 2], "seeds": 1},
            "micro_batch": 8,
            "lanes": 1,
            "guidance_scale": family.scale,
            **({"frames": family.frames} if family.frames > 1 else {}),
        },
        rewards=family.rewards,
    )
    weight = next(
        p for name, p in policy.denoiser().named_parameters() if name.endswith("to_q.weight")
    )
    original, found = weight.clone(), []
    for how in (capture, eager):
        graphs, notes = cache_of(how, limit_bytes=1 << 30)
        with quiet_pool(config) as (pool, specs):
            session = assemble(
                config,
                policy,
                EmbeddingCache(policy),
                pool,
                specs,
                load_prompts(files["train"]),
                graphs=graphs,
            )
            data = [rolled(session)]
            with torch.no_grad():
                weight.mul_(1.5)
            data.append(rolled(session))
        with torch.no_grad():
            weight.copy_(original)
        assert graphs.captures == len(graphs) <= 2 and graphs.replays > 4 and not notes
        found.append([state for one in data for state in one.kept.states])
    assert len(found[0]) == 2 * 2 * 2
    for one, other in zip(*found, strict=True):
        for name in ("x", "children", "log_prob"):
            got, want = (getattr(decision, name).float() for decision in (one, other))
            assert (got - want).norm() <= TOLERANCE[dtype] * want.norm(), name
    assert not torch.equal(found[0][0].children, found[0][4].children), (
        "the graphs follow the weights"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_on_the_gpu(family_folders, tmp_path, name):
    for dtype in TOLERANCE:
        check_graphs(family_folders(name), tmp_path, FAMILIES[name], dtype, "cuda", CudaCapture())


@pytest.mark.parametrize("name", [*FAMILIES, *SIBLINGS])
def test_the_same_comparison_on_the_cpu(family_folders, tmp_path, name):
    family = {**FAMILIES, **SIBLINGS}[name]
    check_graphs(family_folders(name), tmp_path, family, "float32", "cpu", Recorded(nbytes=1))
