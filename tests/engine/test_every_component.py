"""Every component in a real run, with all that it has to get on with: adapters and full weights,
ZeRO 0 and 3, one rank and two, several updates of a rollout, rewards that fail or are for some
prompts alone, and a checkpoint in between."""

import typing

import pytest
from cpu_cases import on_cpu
from engine_cases import HERE
from every_component import CASES, ON_TWO_RANKS, prepare, run, table_of, wrong_with
from run_cases import Run, ranks

from tempflow import registry
from tempflow.config import parse_config
from tempflow.config.schema import Training
from tempflow.training.engine import Runtime

pytestmark = [pytest.mark.slow, pytest.mark.cpu]
ALONE = [name for name in CASES if name not in ON_TWO_RANKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    prepare(folder)
    return folder


def used_by(name, folder) -> set[tuple[str, str]]:
    """(kind, id) of what a case uses; a run on finished latents uses no SDE for its loss, and
    weighs no steps."""
    config = parse_config(table_of(name, folder))
    tables = {
        kind: getattr(getattr(config, key.split(".")[0]), kind)
        for key, kind in registry.IN_CONFIG.items()
    }
    used = {(kind, table["type"]) for kind, table in tables.items() if table} | {
        ("weighting", config.training.profile()["weighting"])
    }
    return {
        (kind, id)
        for kind, id in used
        if config.objective().wants == "states" or kind not in ("sde", "weighting")
    }


def test_every_component_is_in_a_case(folder):
    known = {(kind, id) for kind in registry.IN_CONFIG.values() for id in registry.KINDS[kind].ids}
    names, table = typing.get_args(Training.model_fields["weighting"].annotation)
    known |= {("weighting", id) for id in (*typing.get_args(names), *table.model_fields)}
    assert known - set.union(*(used_by(name, folder) for name in CASES)) == set(), (
        "add them to every_component.CASES"
    )
    corners = {(stage, adapters) for stage, adapters, *_ in CASES.values()}
    assert corners == {
        (0, False),
        (0, True),
        (3, False),
        (3, True),
    }, "full weights and adapters, at both ends of ZeRO"


@pytest.mark.parametrize("name", ALONE)
def test_it_trains_and_resumes(folder, name, monkeypatch):
    """And both times gives DeepSpeed's buckets back, which stay in memory otherwise."""
    ended, close = [], Runtime.close
    monkeypatch.setattr(Runtime, "close", lambda self: close(self) or ended.append(self.engine))
    with on_cpu():
        run(name, folder)
    assert wrong_with(name, folder) == [] and len(ended) == 2
    assert not any(getattr(engine.optimizer, "ipg_buckets", None) for engine in ended)


def test_it_trains_and_resumes_on_two_ranks(folder):
    """All of them in one start."""
    done = ranks(2, HERE / "every_component.py", folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {name: wrong_with(name, folder) for name in ON_TWO_RANKS} == dict.fromkeys(
        ON_TWO_RANKS, []
    )
    assert sum(row["reward/failed"] for row in Run(folder / "dmpo").rows[1:]) > 0, (
        "of forty images a fourth has no reward"
    )
