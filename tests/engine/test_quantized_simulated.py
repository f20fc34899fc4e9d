"""A frozen base in 4 or 8 bits on the simulated GPU, at the real shapes of
configs/flux_lora_24gb.json: one device, nothing waits, and what is held is what --dry-run says."""

from types import SimpleNamespace

import pytest
import torch
from engine_cases import ROOT
from fake_gpu import READ, FakeGpu
from simulated_runs import SimulatedModel, SimulatedRun, cut_card
from test_simulated_gpu import moments, most

from tempflow.config import load_config
from tempflow.estimate import estimate
from tempflow.models.quantized import KINDS, QuantizedLinear
from tempflow.training.ema import Average
from tempflow.training.update import Part, Updater

pytest.importorskip("bitsandbytes")
CONFIG = "flux_lora_24gb"
# forwards of four rows, and a micro-batch of two states
CHANGES = [
    "rollout.num_steps=3",
    "rollout.plan.branch_steps=[0, 1]",
    "rollout.plan.children=3",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers of each kind."""
    gpu, config = FakeGpu(), load_config(ROOT / f"configs/{CONFIG}.json")
    card = cut_card(config.model.path, tmp_path_factory.mktemp("cards"), layers=2)
    with gpu:
        return SimulatedModel(gpu, card, None, config.rollout.size)


@pytest.fixture(scope="module", params=KINDS)
def simulated(request, model):
    """A rollout, an update and a refresh, and what each of them did."""
    gpu = model.gpu
    with gpu:
        run = SimulatedRun(model, CONFIG, [*CHANGES, f"model.quantize={request.param}"])
        runtime = run.make_runtime()
        rolled = run.roll_out()
        s, batch = rolled.session.variant(run.config), run.batches(rolled)[0]
        updater = Updater(runtime, s.sampler, s.objective, s.penalty, s.embed)
        with torch.no_grad():  # tables that a module makes once
            updater.velocity(runtime.engine, batch)
        s.embeddings.each([s.prompts[unit.prompt_id] for unit in batch.units])
        with gpu.watch() as update:
            updater.update(Part.of([batch], 4), 1.0)
        average = Average(runtime, 0.9, 1)
        average.update()
        with gpu.watch() as refresh:
            runtime.refresh(run.policy.denoiser(), average.gather)
    return SimpleNamespace(run=run, runtime=runtime, rolled=rolled, update=update, refresh=refresh)


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def test_all_is_on_the_gpu_and_weighs_what_the_dry_run_says(simulated):
    trained, copy = tensors(simulated.runtime.module), tensors(simulated.run.policy.denoiser())
    assert {t.device for t in trained + copy} == {simulated.run.gpu.device}
    packed = [m for m in simulated.runtime.module.modules() if isinstance(m, QuantizedLinear)]
    assert packed and all(m.weight.dtype == torch.uint8 for m in packed)
    said = {
        item.name.split(": ")[-1]: item.bytes
        for item in estimate(simulated.run.config).memory.resident
    }
    own = {id(t) for t in trained}
    assert sum(t.nbytes for t in trained) == said["parameters"]
    assert sum(t.nbytes for t in copy if id(t) not in own) == said["adapters"]


def test_nothing_that_a_graph_would_capture_waits(simulated):
    """Nor does more of a rollout than once a forward, nor an update before its backward."""
    rolled = simulated.rolled
    assert not any(seen.waits for seen in rolled.forwards["step"])
    waits = {event: n for event, n in rolled.whole.waits.items() if event[0] != "wait for an event"}
    assert sum(waits.values()) <= rolled.data.stats.batches, waits
    (((kind, where), reads),) = simulated.update.waits.items()
    assert kind == READ and "update_stats" in where and reads == 1


def test_memory_is_that_of_the_dry_run(simulated):
    """Weights that are unpacked for a forward or a backward are gone before the next layer's."""
    said = moments(estimate(simulated.run.config).memory)
    assert most(simulated.rolled.forwards["step"]) == pytest.approx(said["rollout"], rel=0.1)
    assert simulated.update.bytes == pytest.approx(said["training"], rel=0.1)
    assert simulated.refresh.bytes == pytest.approx(said["refreshing"], rel=0.1)
