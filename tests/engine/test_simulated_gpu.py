"""The shipped configs of large models on a simulated GPU, at their real shapes: nothing waits where
it must not, and what is held is what --dry-run says."""

from pathlib import Path

import pytest
import torch
from engine_cases import ROOT
from fake_gpu import EVENT, READ, FakeGpu
from family_cases import FAMILIES, SIBLINGS
from simulated_runs import SimulatedModel, SimulatedRun, cut_card

from tempflow.config import load_config
from tempflow.estimate import estimate, local_model
from tempflow.estimate.model import Model
from tempflow.training.ema import Average
from tempflow.training.update import Part, Updater
from tempflow.types import Size

CONFIGS = (
    *(family.config for family in FAMILIES.values()),
    "flux_zero3",
    "sd35_zero2_lora",
    "wan22_a14b_lora",
    *SIBLINGS,
)


@pytest.fixture(scope="module")
def gpu():
    return FakeGpu()


class Simulations:
    """One model by path, with two layers of each kind, and one rollout of it, for all the checks
    and configs of this file."""

    def __init__(self, gpu, folder):
        self.gpu, self.folder = gpu, folder
        self._models, self._rolled, self._trained, self._said = {}, {}, {}, {}

    def run(self, name, changes=None) -> SimulatedRun:
        """name: of a config, a family or a sibling."""
        family = {**FAMILIES, **SIBLINGS}.get(name)
        name, more = (family.config, family.changes) if family else (name, ())
        config = load_config(ROOT / f"configs/{name}.json", more)
        model = config.model
        if model.path not in self._models:
            card = cut_card(model.path, self.folder, layers=2)
            with self.gpu:
                self._models[model.path] = SimulatedModel(
                    self.gpu, card, model.max_sequence_length, config.rollout.size
                )
        return SimulatedRun(self._models[model.path], name, changes, more)

    def said(self, name):
        """The dry run's memory."""
        if name not in self._said:
            self._said[name] = estimate(self.run(name).config).memory
        return self._said[name]

    def rolled(self, name):
        run = self.run(name)
        if run.model not in self._rolled:
            with self.gpu:
                self._rolled[run.model] = run.roll_out()
        return self._rolled[run.model]

    def trained(self, name):
        """What the first micro-batch's forward, loss and backward did."""
        if name not in self._trained:
            run, rolled = self.run(name), self.rolled(name)
            with self.gpu:
                s, batch = rolled.session.variant(run.config), run.batches(rolled)[0]
                updater = Updater(run.make_runtime(), s.sampler, s.objective, s.penalty, s.embed)
                assert len(batch.x) == run.config.training.micro_batch
                with torch.no_grad():  # tables that a module makes once
                    updater.velocity(updater.runtime.engine, batch)
                s.embeddings.each([s.prompts[unit.prompt_id] for unit in batch.units])
                with self.gpu.watch() as seen:
                    metrics = updater.update(Part.of([batch], 4), 1.0)
            assert metrics["forwards"] > 0 and not metrics["skipped"]
            self._trained[name] = seen
        return self._trained[name]


@pytest.fixture(scope="module")
def simulations(gpu, tmp_path_factory):
    return Simulations(gpu, tmp_path_factory.mktemp("cards"))


def moments(memory) -> dict[str, int]:
    """Bytes of the dry run's moments by their first words."""
    return {item.name.split(":")[0].split()[0]: item.bytes for item in memory.moments}


def most(seen) -> int:
    return max(one.bytes for one in seen)


# --------------------------------------------------------------------------------------- host waits
@pytest.mark.parametrize("family", [*FAMILIES, *SIBLINGS])
def test_nothing_captured_copies_or_reads(simulations, family):
    """A forward and its step, as a CUDA graph would capture them."""
    rolled = simulations.rolled(family)
    assert list(rolled.forwards) == ["step"]
    assert (
        sum((seen.waits for seen in rolled.forwards["step"]), start=type(rolled.whole.waits)())
        == {}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_captured_copies_or_reads_in_a_coarser_suffix(simulations, family):
    """In float8 and of second order."""
    changes = [
        "rollout.num_steps=5",
        "rollout.plan.branch_steps=[0]",
        "rollout.plan.children=2",
        'rollout.suffix={"stride": 2, "order": 2, "weights": "float8"}',
    ]
    with simulations.gpu:
        rolled = simulations.run(family, changes).roll_out()
    assert set(rolled.forwards) == {"step", "coarse_step"}
    assert not [event for seen in rolled.forwards.values() for one in seen for event in one.waits]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_waits_at_most_once_a_forward(simulations, family):
    """All of it, decoding included; for the images as the next test says."""
    rolled = simulations.rolled(family)
    waits = {event: n for event, n in rolled.whole.waits.items() if event[0] != EVENT}
    assert sum(waits.values()) <= rolled.data.stats.batches, waits


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_fetched_when_the_gpu_has_other_work(simulations, family):
    """A forward or another decoding; the last ones excepted."""
    rolled = simulations.rolled(family)
    *ahead, last = rolled.whole.ahead
    work = [*rolled.forwards["step"], *rolled.decodes]
    assert len(ahead) + 1 == len(rolled.decodes)
    assert min(ahead) >= min(seen.kernels for seen in work) and last == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_reads_once_and_not_before_a_backward(simulations, name):
    """Its metrics, after the last micro-batch was launched."""
    waits = simulations.trained(name).waits
    last = {event: n for event, n in waits.items() if "training/update_stats.py" in event[1]}
    assert [(kind, n) for (kind, _), n in last.items()] == [(READ, 1)]
    assert sum(waits.values()) == 1, waits


# ------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_of_rollouts_and_evaluations(simulations, name):
    """Peaks above what is there anyway: of a forward, of decoding, and of an evaluation, which does
    both."""
    run, rolled = simulations.run(name), simulations.rolled(name)
    said = moments(simulations.said(name))
    assert most(rolled.forwards["step"]) == pytest.approx(said["rollout"], rel=0.1)
    assert most(rolled.decodes) == pytest.approx(said["decoding"], rel=0.1)
    with run.gpu:
        assert run.evaluate().bytes == pytest.approx(
            max(said["rollout"], said["decoding"]), rel=0.1
        )
    held = next(
        item.bytes for item in simulations.said(name).resident if item.name.startswith("latents")
    )
    assert rolled.whole.bytes == pytest.approx(
        max(said["rollout"], said["decoding"]) + held, rel=0.1
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_of_training(simulations, name):
    assert simulations.trained(name).bytes == pytest.approx(
        moments(simulations.said(name))["training"], rel=0.1
    )


@pytest.mark.parametrize("name", ["flux_zero3", "flux_lora"])
def test_memory_of_a_refresh(simulations, name):
    """Weights and their average go to the rollout copy a bucket at a time, adapters merged."""
    run = simulations.run(name)
    with run.gpu:
        runtime = run.make_runtime()
        average = Average(runtime, 0.9, 1)
        average.update()
        with run.gpu.watch() as seen:
            runtime.refresh(run.policy.transformer, average.gather)
            runtime.refresh(run.policy.transformer)
    assert seen.bytes == pytest.approx(moments(simulations.said(name))["refreshing"], rel=0.1)


def test_memory_of_one_base(gpu, tmp_path):
    """With LoRA the rollout copy holds adapters alone; its forwards hold what the dry run says, and
    nothing captured waits."""
    path = load_config(ROOT / "configs/flux_lora.json").model.path
    with gpu:
        run = SimulatedRun(
            SimulatedModel(gpu, cut_card(path, tmp_path, layers=2), None, Size(1024, 1024)),
            "flux_lora",
        )
        runtime = run.make_runtime()
        rolled = run.roll_out()
    trained, copy = (
        [*module.parameters(), *module.buffers()]
        for module in (runtime.module, run.policy.denoiser())
    )
    shared = {id(t) for t in trained}
    memory = estimate(run.config).memory
    said = {
        item.name.split(":")[0]: item.bytes
        for item in memory.resident
        if item.name.startswith("rollout copy")
    }
    assert (
        sum(t.nbytes for t in copy if id(t) not in shared)
        == said["rollout copy"]
        < 0.1 * sum(t.nbytes for t in trained)
    )
    forwards = rolled.forwards["step"]
    assert most(forwards) == pytest.approx(moments(memory)["rollout"], rel=0.1) and not any(
        seen.waits for seen in forwards
    )


@pytest.mark.slow
def test_flux_at_its_full_depth(gpu):
    """A rollout of 57 blocks against the dry run's line through two and three rows."""
    changes = ["rollout.num_steps=2", "rollout.plan.branch_steps=[0]", "rollout.plan.children=3"]
    with gpu:
        run = SimulatedRun(
            SimulatedModel(
                gpu, Path(local_model("black-forest-labs/FLUX.1-dev")), None, Size(1024, 1024)
            ),
            "flux_lora",
            changes,
        )
        rolled = run.roll_out()
    forwards = rolled.forwards["step"]
    assert (
        len(forwards) == 2
        and not any(seen.waits for seen in forwards)
        and forwards[0].kernels > 3000
    )
    assert most(forwards) == pytest.approx(Model(run.config).forward(4).bytes, rel=0.1)
