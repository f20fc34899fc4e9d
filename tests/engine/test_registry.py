"""Components by name: what a config may say of them, every refusal, and keys and run directories of
earlier versions."""

import json

import pytest
from engine_cases import config_table, small_config, write_config
from run_cases import script_here, train

from tempflow import __main__ as command
from tempflow import registry
from tempflow.config import load_config, parse_config
from tempflow.config.moved import MOVED, translate
from tempflow.errors import UserError
from tempflow.run.directory import read_config
from tempflow.sampling.plans.tempflow import TempFlow
from tempflow.types import Unit

MINE = '''
from tempflow.errors import UserError
from tempflow.sampling.plans.base import Plan
from tempflow.types import Row


class Tail(Plan):
    """Noise at the last steps.

    Args:
        length: of the tail,
            in steps.
    """

    def __init__(self, length: int, seeds: int = 3):
        if length < 1:
            raise UserError(f"length: expected 1 or more, got {length}")
        self.length, self.seeds = length, seeds

    def prepare(self, num_steps, run_seed):
        super().prepare(num_steps, run_seed)
        if self.length > num_steps - 1:
            raise UserError(f"length: {self.length} of {num_steps - 1} steps")

    def steps(self, iteration):
        return list(range(self.num_steps - 1 - self.length, self.num_steps - 1))

    def rows(self, unit, iteration):
        return [Row(unit, noise=frozenset(self.steps(iteration)))]


class Half(Plan):
    def steps(self, iteration):
        return [0]


def plan(seeds):
    return None
'''


@pytest.fixture
def mine(tmp_path, monkeypatch, request):
    """A user's module in the working directory, under a name of its own for each test."""
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return name


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


# ----------------------------------------------------------------------------------------- building
@pytest.mark.parametrize(
    "given, words",
    [
        (
            "tempflw",
            [
                "rollout.plan: unknown plan 'tempflw'",
                "did you mean 'tempflow'?",
                "mix_grpo, samples, tempflow, tree",
                "'my_module:MyPlan'",
            ],
        ),
        ("branch_grpo", ["rollout.plan: 'branch_grpo' is now called 'tree'"]),
        ({"type": 3}, ["rollout.plan.type: expected an id or module:Name of a plan, got 3"]),
        (
            {"childern": 3},
            [
                "rollout.plan.childern: no such option, did you mean 'children'?",
                "type, seeds, children, branch_steps",
            ],
        ),
        (
            {"type": "flow_grpo", "children": 3},
            ["rollout.plan.children: no such option", "Allowed: type, seeds, branch_steps"],
        ),
        ({"seeds": 2.5}, ["rollout.plan.seeds: expected a whole number, got 2.5"]),
        ({"seeds": True}, ["rollout.plan.seeds: expected a whole number, got True"]),
        ({"seeds": 0}, ["rollout.plan.seeds: expected a number at least 1", "got 0"]),
        (
            "no_such_module:Plan",
            ["rollout.plan: cannot import 'no_such_module:Plan'", "folder of the command"],
        ),
        ("tempflow.registry:Nothing", ["rollout.plan: cannot import", "AttributeError", "Nothing"]),
        (
            "tempflow.sampling.steps:Flow",
            [
                "rollout.plan: tempflow.sampling.steps:Flow is not a plan",
                "tempflow.sampling.plans.base.Plan",
            ],
        ),
    ],
)
def test_refused(given, words):
    text = message(registry.build, "plan", given)
    assert all(word in text for word in words), text


def test_other_kinds_are_refused_under_their_own_keys():
    for kind, given, start in (
        ("penalty", "kl", "training.penalty.coef: this option has no default"),
        (
            "advantage",
            {"over": "batch"},
            (
                "training.advantage.over: expected 'state' or 'seed' or 'prompt' or 'step', got"
                " 'batch'"
            ),
        ),
        (
            "objective",
            {"clip_low": 1.0},
            "training.objective.clip_low: expected a number above 0 and below 1, got 1.0",
        ),
        (
            "sde",
            {"type": "cps", "eta": 1.1},
            "rollout.sde.eta: expected a number above 0 and at most 1, got 1.1",
        ),
    ):
        assert message(registry.build, kind, given).startswith(start)


def test_every_component_is_found_and_described():
    for name in registry.IN_CONFIG.values():
        for id in registry.KINDS[name].ids:
            target = registry.find(name, id)
            assert registry.summary_of(target), id
            assert all(option.help for option in registry.options_of(target)), id


def test_a_plan_of_ones_own_from_the_working_directory(mine):
    config = parse_config(
        config_table(
            rollout={"plan": {"type": f"{mine}:Tail", "length": 2}},
            training={"advantage": {"over": "prompt"}},
        )
    )
    assert config.rollout.plan == {"type": f"{mine}:Tail", "length": 2, "seeds": 3}
    (row,) = config.plan().rows(Unit(0, 0, 0, 0), 0)
    assert row.noise == {7, 8} and config.plan().steps(5) == [7, 8]
    option, _ = registry.options_of(registry.find("plan", f"{mine}:Tail"))
    assert option.help == "of the tail, in steps."


@pytest.mark.parametrize(
    "given, words",
    [
        ({"type": "Tail"}, ["rollout.plan.length: this option has no default"]),
        ({"type": "Tail", "length": 0}, ["rollout.plan.length: expected 1 or more, got 0"]),
        ({"type": "Tail", "length": 10}, ["rollout.plan.length: 10 of 9 steps"]),
        ({"type": "Half"}, ["does not define rows"]),
        ({"type": "plan"}, ["is not a plan"]),
    ],
)
def test_a_plan_of_ones_own_that_is_refused(mine, given, words):
    table = config_table(
        rollout={"plan": {**given, "type": f"{mine}:{given['type']}"}},
        training={"advantage": {"over": "prompt"}},
    )
    text = message(parse_config, table)
    assert text.startswith("rollout.plan") and all(word in text for word in words), text


def test_a_module_that_fails_names_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_plan.py").write_text("import json\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert "broken_plan.py:2" in message(registry.build, "plan", "broken_plan:Plan")


def test_components_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(
        command, "KINDS", {name: registry.KINDS[name] for name in ("plan", "penalty")}
    )
    monkeypatch.setattr("sys.argv", ["tempflow", "components"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    plans = list(registry.KINDS["plan"].ids)
    assert lines[0] == "plan: rollout.plan" and "training.penalty" in lines[len(plans) + 2]
    assert [line.split("(")[0].strip() for line in lines[1 : len(plans) + 1]] == plans
    assert '  kl(coef, form="x", to="reference", steps=null): KL divergence' in "\n".join(
        lines[len(plans) + 3 :]
    )
    described = lines[lines.index("weighting: training.weighting") + 1 :]
    for line in described:  # JSON, a colon and words
        value, _ = json.JSONDecoder().raw_decode(line.strip().replace("gamma", "0.5", 1))
        small_config(training={"weighting": value})
    assert len(described) == 4
    monkeypatch.setattr("sys.argv", ["tempflow"])
    assert command.main() == 0 and "components" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- config
def test_the_resolved_config_is_complete_and_reads_back(tmp_path):
    config = load_config(
        write_config(tmp_path, training={"penalty": {"coef": 0.1}, "advantage": "gdpo"})
    )
    table = json.loads(config.model_dump_json())
    assert table["training"]["penalty"] == {
        "type": "kl",
        "coef": 0.1,
        "form": "x",
        "to": "reference",
        "steps": None,
    }
    shaping = {"utility": None, "scale": "std", "anchor": 0.0}
    assert table["training"]["advantage"] == {
        "type": "gdpo",
        "over": "seed",
        "clip": 5.0,
        "global_std": False,
        **shaping,
    }
    assert table["rollout"]["sde"] == {"type": "flow", "eta": 0.7}
    assert parse_config(table) == config
    assert (
        isinstance(config.plan(), TempFlow)
        and config.penalty().coef == 0.1
        and config.advantage().over == "seed"
    )


@pytest.mark.parametrize("plan", [None, "tempflow", {"seeds": 2}, {"type": "tempflow", "seeds": 2}])
def test_an_option_is_set_whatever_the_file_holds(tmp_path, plan):
    table = config_table()
    table["rollout"].pop("plan")
    table["rollout"] |= {} if plan is None else {"plan": plan}
    file = tmp_path / "one.json"
    file.write_text(json.dumps(table))
    found = load_config(file, ["rollout.plan.children=8"]).rollout.plan
    assert found == {
        "type": "tempflow",
        "seeds": 2 if isinstance(plan, dict) else 4,
        "children": 8,
        "branch_steps": "all",
    }


@pytest.mark.parametrize("setting", ["rollout.plan=flow_grpo", "rollout.plan.type=flow_grpo"])
def test_another_type_drops_the_options_of_the_one_before(tmp_path, setting):
    file = write_config(tmp_path, training={"advantage": {"over": "prompt"}})
    plan = load_config(file, [setting, "rollout.plan.seeds=5"]).rollout.plan
    assert plan == {"type": "flow_grpo", "seeds": 5, "branch_steps": "all", "values": False}
    assert load_config(file, ["rollout.plan=tempflow"]).rollout.plan["branch_steps"] == [0, 4, 8]


def test_a_penalty_is_set_and_taken_away(tmp_path):
    file = write_config(tmp_path)
    assert load_config(file).training.penalty is None
    found = load_config(file, ["training.penalty.coef=0.004"])
    assert (
        found.training.penalty["coef"] == 0.004
        and found.training.penalty["type"] == "kl"
        and found.penalty().form == "x"
    )
    assert (
        load_config(file, ["training.penalty.coef=0.004", "training.penalty=null"]).penalty()
        is None
    )


# ------------------------------------------------------------------------------------- earlier keys
@pytest.mark.parametrize("key", MOVED)
def test_moved_keys_say_where_they_went(tmp_path, key):
    text = message(load_config, write_config(tmp_path), [f"{key}=1"])
    assert text == f"{key}: {MOVED[key]}"


def test_a_moved_key_ends_with_status_2(tmp_path):
    done = script_here("train", "--config", write_config(tmp_path), "--set", "rollout.children=3")
    assert (
        done.returncode == 2
        and done.stderr == "error: rollout.children: moved to rollout.plan.children\n"
    )


def as_before(config) -> dict:
    """A config's tables with the keys of the version before components."""
    table = json.loads(config.model_dump_json())
    r, t = table["rollout"], table["training"]
    plan, sde = r.pop("plan"), r.pop("sde")
    r |= {
        "plan": plan["type"],
        "seeds": plan["seeds"],
        "children": plan.get("children", 6),
        "branch_steps": plan.get("branch_steps", "all"),
    }
    r |= {
        "window": {"size": plan.get("window", 4), "every": plan.get("every", 25)},
        "sde": sde["type"],
        "eta": sde["eta"],
    }
    advantage, objective, penalty = (
        t.pop("advantage"),
        t.pop("objective"),
        t.pop("penalty") or {"coef": 0.0, "form": "x"},
    )
    t |= {
        "advantage_of": {"group": "sum", "gdpo": "each"}[advantage["type"]],
        "advantage_group": advantage["over"],
    }
    t |= {
        "global_std": advantage["global_std"],
        "adv_clip": advantage["clip"],
        "share_group_forward": True,
    }
    t |= {key: objective[key] for key in ("clip_low", "clip_high", "ratio")} | {
        "kl_coef": penalty["coef"],
        "kl_form": penalty["form"],
    }
    t["updates_per_rollout"] = t.pop("updates")["passes"]
    return table


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "rollout": {
                "plan": {"type": "mix_grpo", "seeds": 3, "window": 2, "every": 9},
                "sde": "cps",
            },
            "training": {"advantage": {"over": "prompt"}},
        },
        {
            "rollout": {"plan": {"type": "flow_grpo", "branch_steps": {"random": 2}}},
            "training": {
                "advantage": {"type": "gdpo", "over": "prompt"},
                "penalty": {"coef": 0.1, "form": "v"},
                "updates": {"passes": 3},
            },
        },
    ],
)
def test_configs_of_runs_of_the_version_before_are_translated(changes):
    config = parse_config(config_table(**changes))
    table = as_before(config)
    assert table["training"].keys() & {"kl_coef"} and "moved to" in message(parse_config, table)
    translate(table)
    assert parse_config(table) == config
    now = json.loads(config.model_dump_json())
    again = json.loads(json.dumps(now))
    translate(again)
    assert again == now


def test_a_run_of_the_version_before_goes_on(tmp_path):
    small = {"rollout": {"num_steps": 3, "plan": {"branch_steps": [0, 1]}}, "eval": {"every": 0}}
    run = train(
        tmp_path,
        "old",
        processes=None,
        training={"iterations": 1, "penalty": {"coef": 0.1}},
        **small,
    )
    file = run.folder / "config.json"
    started = json.loads(file.read_text())["$started_in"]
    config = read_config(run.folder)
    file.write_text(json.dumps({"$started_in": started, **as_before(config)}))
    assert read_config(run.folder) == config and load_config(file) == config
    other = train(
        tmp_path,
        "old",
        "--resume",
        processes=None,
        status=2,
        training={"iterations": 2, "penalty": {"coef": 0.2}},
        **small,
    )
    assert "training.penalty.coef is 0.2, but the run in" in other.done.stderr
    run = train(
        tmp_path,
        "old",
        "--resume",
        processes=None,
        training={"iterations": 2, "penalty": {"coef": 0.1}},
        **small,
    )
    assert [row["iteration"] for row in run.rows][-1] == 2
    assert json.loads(file.read_text())["rollout"]["plan"]["type"] == "tempflow"


def test_a_plan_without_noise_needs_an_objective_that_learns_from_endpoints(tmp_path, monkeypatch):
    """Refused before anything is loaded: no state would be left to train on."""
    source = """from tempflow.sampling.plans.base import Plan
from tempflow.types import Row


class Samples(Plan):
    seeds = 3

    def steps(self, iteration):
        return []

    def rows(self, unit, iteration):
        return [Row(unit)]
"""
    (tmp_path / "plain_rows.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    changes = {
        "rollout": {"plan": "plain_rows:Samples"},
        "training": {"advantage": {"over": "prompt"}},
    }
    with pytest.raises(UserError, match="rollout.plan: plain_rows:Samples takes no noise"):
        small_config(**changes)
    changes["training"]["objective"] = "nft"
    assert small_config(**changes).plan().seeds == 3
