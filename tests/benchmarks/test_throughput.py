"""throughput.py measures equal work, forecasts what it needs, loses nothing in a crash and gives
back what it held."""

import json
import sys
import weakref
from argparse import Namespace

import numpy as np
import pytest
import sequential
import throughput
import torch
from bench import Bench, Engine, Iteration, matmul_peak, roll_out_and_score
from engine_cases import small_config, write_config
from forecast import SPARE, forecast
from gpu_steps.models import card_folder
from kernel_cases import assert_close

from tempflow.errors import UserError

pytestmark = pytest.mark.cpu  # in this process
SMALL = {
    "rollout": {"num_steps": 4, "plan": {"children": 2, "branch_steps": "all"}, "micro_batch": 16},
    "training": {"penalty": {"coef": 0.01}, "micro_batch": 16, "ema": None},
}


@pytest.fixture(scope="module")
def bench():
    made = Bench(small_config(**SMALL), iterations=2)
    with made.session.pool:
        yield made


def test_the_text_encoders_are_gone_before_the_rest_is_loaded(bench):
    pipe = bench.session.policy.pipe
    assert pipe.text_encoder is None and pipe.text_encoder_2 is None
    assert pipe.transformer is not None and bench.session.embed_prompts(bench.order.indices(1))


def test_the_papers_procedure_does_the_same_work(bench, monkeypatch):
    """Its states, children and rewards are the engine's: only order, batches and sharing differ."""
    session = bench.session
    rolled, scored = roll_out_and_score(session, bench.order.indices(0), 0)
    kept, train = {}, sequential.train

    def keep(session, rolled, scored, each_child):
        kept.update(states=rolled.kept.states, rewards=scored.rewards)
        return train(session, rolled, scored, each_child)

    monkeypatch.setattr(sequential, "train", keep)
    result = sequential.Sequential(bench, session.config)(0)
    assert len(kept["states"]) == len(rolled.kept.states) == 2 * 2 * 3
    for one, other in zip(kept["states"], rolled.kept.states, strict=True):
        assert (
            one.unit == other.unit
            and one.step == other.step
            and one.slots.tolist() == other.slots.tolist()
        )
        assert_close("state", one.x, other.x, 1e-5)
        assert_close("children", one.children, other.children, 1e-5)
    np.testing.assert_allclose(kept["rewards"].total, scored.rewards.total, atol=2e-3)
    assert session.advantage(rolled.layout.slots, kept["rewards"]).values.any()
    # 4 units: a trunk of 3 forwards, and 2 children at each of 3 branch steps, each with a first
    # forward and its suffix
    assert result.forwards["rollout"] == 4 * (3 + 2 * (4 + 3 + 2))


def test_variants_count_what_they_run(bench):
    wanted, kept = throughput.variants(bench.session.config, compiled=False, gpu=False), []
    rows = throughput.measure(
        {False: bench}, wanted, 1, lambda rows: kept.append([row["variant"] for row in rows])
    )
    assert kept == [[v.name for v in wanted][: n + 1] for n in range(len(wanted))], (
        "rows are kept as they come"
    )
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name)[0] == "paper's procedure"
    engine, separate = by_name["engine"], by_name["engine, one forward per child"]
    assert (
        separate["forwards"]["train"]
        == by_name["paper's procedure"]["forwards"]["train"]
        == 2 * engine["forwards"]["train"]
    )
    assert (
        separate["forwards"]["rollout"]
        == engine["forwards"]["rollout"]
        == 4 * (4 + 2 * (3 + 2 + 1))
    )
    assert by_name["Flow-GRPO, as many images"]["images"] == 2 * 2 * 3 * 2
    peaks = {"rollout": 1e9, "train": 1e9}
    throughput.add_ratios(rows, 10**6, peaks, bench.session.config)
    assert rows[0]["times_faster"] == rows[0]["train_times_faster"] == 1
    rollout = engine["forwards"]["rollout"] * 1e6 / engine["seconds"]["rollout"] / 1e9
    assert engine["mfu_rollout"] == pytest.approx(rollout)
    # one update and one pass of the reference: rows count 3 and 1 forwards
    assert engine["mfu_train"] == pytest.approx(
        engine["forwards"]["train"] * 2 * 1e6 / engine["seconds"]["train"] / 1e9
    )


class Stub:
    """A variant that holds memory from its first iteration until `free`."""

    holding: set = set()
    most = 0

    def __init__(self, bench, config):
        self.config = config

    def __call__(self, iteration):
        if iteration == self.config.get("fails_in"):
            raise RuntimeError("out of memory")
        self.holding.add(id(self))
        Stub.most = max(Stub.most, len(self.holding))
        return Iteration(dict.fromkeys(throughput.PHASES, 1.0), 4, {"rollout": 1, "train": 1})

    def free(self):
        self.holding.discard(id(self))


def test_a_variant_gives_back_what_it_holds_in_its_last_round():
    wanted = [throughput.Variant(name, {}, Stub) for name in "abc"]
    throughput.measure({False: None}, wanted, 2, lambda rows: None)
    assert not Stub.holding and Stub.most == 3


def test_a_crash_loses_nothing():
    kept = []
    wanted = [throughput.Variant("a", {}, Stub), throughput.Variant("b", {"fails_in": 2}, Stub)]
    with pytest.raises(RuntimeError):
        throughput.measure({False: None}, wanted, 3, kept.append)
    assert {row["variant"]: len(row["totals_s"]) for row in kept[-1]} == {"a": 2, "b": 1}


def test_an_engine_variant_lets_its_session_go(bench):
    run = Engine(bench, bench.session.config)
    run(0)
    session = weakref.ref(run._session)
    run.free()
    assert session() is None


# ----------------------------------------------------------------------------------------- forecast
def arguments(**changes):
    return Namespace(**{"only": None, "compile": False, "set": [], "rounds": 3, **changes})


@pytest.fixture
def announce(monkeypatch, tmp_path):
    """announce(bytes of the card, --compile) of the default variants on a GPU, at FLUX.1-dev's
    shape with few layers and heads."""
    config = throughput.large_config(
        256, arguments(), card_folder("flux-dev", tmp_path, 2, rehearse=True)
    )
    monkeypatch.setattr(throughput, "uses_gpu", lambda: True)
    monkeypatch.setattr(throughput, "matmul_peak", lambda dtype, device: 600e12)
    monkeypatch.setattr(throughput, "device_name", lambda: "CARD")

    def announce(total: int, compiled: bool = False) -> None:
        monkeypatch.setattr(
            "torch.cuda.get_device_properties", lambda device: Namespace(total_memory=total)
        )
        throughput.announce({"small": config}, arguments(compile=compiled))

    variants = throughput.variants(config, compiled=False, gpu=True)
    announce.configs, announce.per_child = (
        [v.config for v in variants],
        [v.kind is not Engine for v in variants],
    )
    return announce


def test_what_does_not_fit_is_refused_before_anything_is_made(announce, capsys):
    found = forecast(announce.configs, 600e12, per_child=announce.per_child)
    assert found.seconds > forecast(announce.configs, 600e12).seconds, (
        "a forward for every child takes longer"
    )
    needed = int(found.bytes + SPARE)
    announce(needed + 1)
    said = capsys.readouterr().out
    assert (
        f"small: about {found.seconds * 4 / 60:.1f} minutes for 3 rounds and one to warm up" in said
    )
    assert f"up to {found.bytes / 1e9:.1f} GB" in said
    with pytest.raises(
        UserError, match="small: needs .* GB, CARD has .*--only.*leave --compile out.*--quick"
    ):
        announce(needed - 1)
    with pytest.raises(UserError):  # a second engine
        announce(needed + 1, compiled=True)


def test_the_forecast_is_the_dry_runs_largest_moment_over_what_all_variants_hold(announce):
    from tempflow.estimate.estimate import estimate

    made = [estimate(config).memory for config in announce.configs]
    items = [
        {item.name: item.bytes for item in memory.resident if item.name != "text encoders"}
        for memory in made
    ]
    shared, names = min(sum(one.values()) for one in items), {name for one in items for name in one}
    assert {"CUDA graph of the rollout", "float8 copy for suffixes"} <= names
    extra = sum(sum(one.values()) - shared for one in items)
    moments = {item.name: item.bytes for memory in made for item in memory.moments}
    assert forecast(announce.configs, 1e12).bytes == shared + extra + max(moments.values())
    assert forecast(announce.configs, 1e12).seconds == pytest.approx(
        10 * forecast(announce.configs, 1e13).seconds
    )


def test_graphs_are_what_sets_one_variant_apart():
    wanted = throughput.variants(
        throughput.large_config(512, arguments()), compiled=False, gpu=True
    )
    assert [v.name for v in wanted if v.config.rollout.graphs] == ["engine, CUDA graphs"]


def test_an_unknown_variant_is_refused():
    with pytest.raises(
        UserError, match="--only nonsense: no such variant; there are paper's procedure, "
    ):
        throughput.chosen(small_config(), arguments(only=["nonsense"]))


# ------------------------------------------------------------------------------------------ command
@pytest.mark.slow
def test_throughput_as_a_command(tmp_path, monkeypatch):
    """And once more in the same process, beside nothing of the first."""
    engines = []

    class Watched(Bench):
        def __init__(self, *args):
            throughput.release()
            assert not any(engine() for engine in engines), "the engine before is still there"
            super().__init__(*args)
            engines.append(weakref.ref(self.session.runtime.engine))

    monkeypatch.setattr(throughput, "Bench", Watched)
    config = write_config(tmp_path, **SMALL)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "throughput.py",
            "--config",
            str(config),
            "--quick",
            "--only",
            "suffix",
            "--output",
            str(tmp_path),
        ],
    )
    for _ in range(2):
        assert throughput.main() == 0
    (report,) = tmp_path.glob("throughput-small-*.json")
    record = json.loads(report.read_text())
    assert {"date", "device", "versions", "config", "rows"} <= record.keys() and len(
        record["rows"]
    ) == 1
    assert record["complete"] is True and [len(row["totals_s"]) for row in record["rows"]] == [1]
    assert report.with_suffix(".png").stat().st_size > 5000 and len(engines) == 2


def test_peak_is_a_rate():
    assert 1e8 < matmul_peak(torch.float32, torch.device("cpu")) < 1e14
