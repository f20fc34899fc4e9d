"""Whole runs on the shipped model, one started as a user starts it, the others from processes with
the libraries loaded (preloaded.py); every run serves several tests.

What is compared: 1 process with 2, ZeRO stages 0, 2 and 3, stopped and resumed with undisturbed.
What the other scripts make of such a run: test_run_use.py.
"""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from engine_cases import MODEL, ROOT, plan_table, write_config
from kernel_cases import assert_close
from PIL import Image
from run_cases import FEW_STEPS, SGD, Run, ranks, script_here, timeless, train, train_checked
from safetensors.torch import load_file

from tempflow.run.metrics import describe

# One rank against two, a run against its resumed half, bit for bit: the CPU's part. A GPU's is
# test_gpu_runs.py.
pytestmark = [pytest.mark.slow, pytest.mark.cpu]

CONTRACT = """iteration reward/mean reward/std reward/zero_std_groups loss kl ratio/max_dev clip_fraction grad_norm images
forwards/rollout forwards/train time/rollout time/decode time/reward time/train time/sync time/total""".split()
STEPS = FEW_STEPS["plan"]["branch_steps"]
# Rollouts of different batch shapes differ in their last bits, which turns a pixel's level here and
# there; rewards are in percent of the brightness, and one level of one of 9216 values is 1e-4 of a
# picture's.
REWARDS, UPDATE = 1e-4, 3e-4
DRIFT = (
    0.1  # gray levels of the mean color of a few images; one pixel more or less may count as ink
)


# ZeRO-3 keeps small weights whole, as all of this model's are, unless told otherwise.
ZERO = {stage: {"stage": stage} for stage in (0, 1, 2)} | {
    3: {"stage": 3, "stage3_param_persistence_threshold": 0}
}
ZERO["offloaded"] = {
    **ZERO[3],
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}


# ---------------------------------------------------------------------- world sizes and ZeRO stages
LAYOUTS = {
    "one": (1, 0),
    "two": (2, 0),
    "two-zero2": (2, 2),
    "two-zero3": (2, 3),
    "offloaded": (2, "offloaded"),
}


@pytest.fixture(scope="session")
def launched(folder):
    """Three iterations by layout: (processes, kind of ZeRO); one of them under the deepspeed
    launcher."""
    made = {}

    def get(layout):
        if layout not in made:
            processes, stage = LAYOUTS[layout]
            # its ranks embed a share each
            cache = str(folder / "embeddings") if layout == "two-zero2" else None
            more = {"logging": {"tensorboard": layout == "one"}, "data": {"embedding_cache": cache}}
            more["launcher"] = layout == "two"
            # blocks computed again inside of ZeRO-3's hooks, beside the plain ones of stage 0
            more["model"] = {"gradient_checkpointing": layout == "two-zero3"}
            made[layout] = start(folder, layout, processes, stage, **more)
        return made[layout]

    return get


def start(folder, name, processes, stage, **more) -> Run:
    # No ratio comes near its bounds, where rounding would decide.
    training = {
        "iterations": 3,
        "updates": {"passes": 2},
        "objective": {"clip_low": 0.2, "clip_high": 0.2},
        "penalty": {"coef": 0.1},
        "advantage": {"type": "gdpo"},
    }
    deepspeed = {
        **SGD,
        "gradient_clipping": 0.02,
        "zero_optimization": ZERO[stage],
        "zero_force_ds_cpu_optimizer": False,
    }
    watched = {"type": "engine_rewards:warmth", "weight": 0}
    more["rewards"] = {
        "engine_rewards:contrast": 1.0,
        "engine_rewards:warmth": 0.5,
        "watched": watched,
    }
    # many gathers, as a large model needs
    more["rollout"] = {"refresh_bucket": 50_000, **FEW_STEPS, **more.get("rollout", {})}
    return train(
        folder,
        name,
        processes=processes,
        training=training,
        deepspeed=deepspeed,
        reward_pool={"workers": 1},
        **more,
    )


def base_weights() -> dict[str, torch.Tensor]:
    (file,) = (MODEL / "transformer").glob("*.safetensors")
    return load_file(file)


def update_of(run: Run, **which) -> torch.Tensor:
    base, weights = base_weights(), run.weights(**which)
    assert base.keys() == weights.keys()
    return torch.cat(
        [(weights[name].double() - base[name].double()).flatten() for name in sorted(base)]
    )


def test_run_leaves_what_the_contract_names(launched):
    run = launched("one")
    rows = run.rows
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert set(CONTRACT) <= row.keys() and {f"reward_std/step_{k}" for k in STEPS} <= row.keys()
        assert all(
            isinstance(row[key], (int, float)) and math.isfinite(row[key]) for key in CONTRACT
        )
        assert row["images"] == 4 * (1 + 3 * 2)
        assert row["forwards/rollout"] == 4 * (5 + 2 * (4 + 3 + 1))
        assert row["forwards/train"] == 3 * 12, "two updates of 4 x 3 states, and their reference"
        assert (
            row["kl"] > 0
            and row["reward/std"] > 0
            and row["grad_norm"] > 0
            and row["reward/zero_std_groups"] == 0
        )
        assert row["ratio/max_dev"] > 0 and row["mismatch/log_prob"] < 1e-5
        assert row["time/total"] >= row["time/rollout"] + row["time/train"] > 0
    assert (
        ["eval/reward" in row for row in rows]
        == ["drift/color_shift" in row for row in rows]
        == [True, False, True, True]
    )
    assert [
        rows[0][key] for key in ("drift/color_shift", "drift/color_spread", "drift/diversity")
    ] == [0, 1, 1]
    assert rows[3]["drift/color_shift"] > 0
    assert not [
        key for row in rows for key in row if key != "iteration" and describe(key) is None
    ], "they are in run/metrics.py"
    for name in (
        "config.json",
        "report.html",
        "summary.json",
        "samples/000000/samples.json",
        "checkpoints/000003",
    ):
        assert (run.folder / name).exists(), name
    assert list((run.folder / "tensorboard").glob("events*"))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (
        summary["base_reward"] == rows[0]["eval/reward"]
        and summary["tuned_reward"] == rows[3]["eval/reward"]
    )
    assert summary["drift/color_shift"] == rows[3]["drift/color_shift"]
    assert summary["iterations"] == 3 and summary["images"] == 84 and summary["world_size"] == 1
    assert "iteration 3/3" in run.done.stdout and "report.html" in run.done.stdout


def test_the_gradient_is_clipped_and_reported_unclipped(launched):
    """Gradient descent with clipped norm 0.02 and rate 1 moves by 6 steps of 0.02 at most."""
    run = launched("one")
    assert all(row["grad_norm"] > 0.02 for row in run.rows[1:])
    assert 0.02 < update_of(run).norm() < 6 * 0.02 * (1 + 1e-3)


@pytest.mark.parametrize("layout", ["two", "two-zero2", "two-zero3", "offloaded"])
def test_layouts_agree(launched, layout):
    """The same samples, and to rounding the same updates."""
    assert_agree(launched("one"), launched(layout))


def assert_agree(one: Run, other: Run):
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("reward", "eval/", "diversity/")):
                assert a[key] == pytest.approx(b[key], abs=REWARDS), (a["iteration"], key)
            elif key.startswith("drift/"):
                assert a[key] == pytest.approx(b[key], abs=DRIFT), (a["iteration"], key)
            elif key in ("images", "images/total", "forwards/rollout", "forwards/train", "lr"):
                assert a[key] == b[key], (a["iteration"], key)
            elif key in ("grad_norm", "kl"):
                assert a[key] == pytest.approx(b[key], rel=UPDATE), (a["iteration"], key)
            elif key in ("loss", "ratio/min", "ratio/max"):
                assert a[key] == pytest.approx(b[key], abs=3e-6), (a["iteration"], key)
    assert_close("update", update_of(other), update_of(one), UPDATE)
    for iteration in (0, 3):
        for p, q in zip(
            *(
                sorted((run.folder / f"samples/{iteration:06d}").glob("*.png"))
                for run in (one, other)
            ),
            strict=True,
        ):
            difference = np.abs(np.asarray(Image.open(p)).astype(int) - np.asarray(Image.open(q)))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_training_through_the_engine_itself(launched, folder):
    """Without the rollout copy, ZeRO-3 gathers the weights for every rollout forward; the run is
    the same."""
    assert_agree(
        launched("two-zero3"), start(folder, "no-replica", 2, 3, rollout={"replica": False})
    )


def test_without_the_rollout_copy_there_is_one_transformer(folder, monkeypatch):
    from diffusers import FluxTransformer2DModel

    loaded, load = [], FluxTransformer2DModel.from_pretrained
    monkeypatch.setattr(
        FluxTransformer2DModel, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k)
    )
    changes = {"training": {"iterations": 1, "penalty": {"coef": 0.1}}, "eval": {"every": 0}}
    without, lane = ({**FEW_STEPS, **more} for more in ({"replica": False}, {"lanes": 1}))
    run = train(folder, "single", processes=None, rollout=without, **changes)
    assert len(loaded) == 1
    # the same batches
    copied = train(folder, "copied", processes=None, rollout=lane, **changes)
    assert len(loaded) == 3
    assert (
        run.rows[1]["reward/mean"] == copied.rows[1]["reward/mean"]
        and run.rows[1]["loss"] == copied.rows[1]["loss"]
    )
    assert all(torch.equal(value, copied.weights()[name]) for name, value in run.weights().items())


def test_unequal_shares_of_the_engines_own_forwards_are_refused(folder):
    """They would wait for each other for ever: a forward under ZeRO-3 is a collective."""
    settings = {
        "data.prompts_per_iteration": 3,
        "rollout.plan.seeds": 1,
        "rollout.replica": "false",
    }
    zero = json.dumps({"stage": 3})
    config = write_config(folder, "unequal.json", logging={"dir": str(folder)})
    pairs = [part for item in settings.items() for part in ("--set", "=".join(map(str, item)))]
    more = [*pairs, "--set", f"deepspeed.zero_optimization={zero}"]
    done = ranks(2, ROOT / "engine/train.py", "--config", config, *more)
    text = done.stdout + done.stderr
    assert done.returncode == 2 and text.count("error: ") == 1, text
    assert (
        "data.prompts_per_iteration x rollout.plan.seeds: 3 for 2 ranks" in text
        and "rollout.replica" in text
    )


def test_existing_run_directory_is_refused(launched):
    run = launched("one")
    files = [file for file in run.folder.rglob("*") if file.name != ".lock"]
    before = {file: file.stat().st_mtime_ns for file in files}
    done = ranks(2, ROOT / "engine/train.py", "--config", run.folder.parent / "one.json")
    assert done.returncode == 2
    text = done.stdout + done.stderr
    assert (
        text.count("error: run directory") == 1 and str(run.folder) in text and "--resume" in text
    )
    assert "Traceback" not in text
    assert {
        file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.name != ".lock"
    } == before


# ---------------------------------------------------------------------------- stopping and resuming
# Batches that are scored: 1 to test the reward at each start; 1 in the first evaluation; 2 an
# iteration; 1 after iteration 2.
IN_ITERATION_3, IN_ITERATION_4 = 8, 10


def assert_same_runs(one: Run, other: Run):
    """Bit for bit, in all but the clock."""
    assert [timeless(row) for row in one.rows] == [timeless(row) for row in other.rows]
    for name in ("weights", "ema"):
        a, b = one.weights(name=name), other.weights(name=name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert one.checkpoints[-1] == other.checkpoints[-1] and one.pictures(4) == other.pictures(4)


def test_whole_run_does_something(whole):
    assert [row["iteration"] for row in whole.rows] == [0, 1, 2, 3, 4] and whole.checkpoints == [
        2,
        4,
    ]
    raw, average = update_of(whole), update_of(whole, name="ema")
    assert raw.norm() > 0 and average.norm() > 0 and (raw - average).norm() > 0.1 * raw.norm()
    assert whole.rows[1]["lr"] > whole.rows[4]["lr"] and whole.rows[4]["kl"] > 0


def test_sigterm_saves_and_resume_goes_on(interrupted, whole):
    """Two iterations, a signal in the third, and two more: the run of four. Nothing is saved but by
    the signal."""
    stopped = interrupted("stopped", at=IN_ITERATION_3, every=0)
    assert (
        stopped.done.returncode == 0
        and "SIGTERM" in stopped.done.stdout
        and "--resume" in stopped.done.stdout
    )
    assert [row["iteration"] for row in stopped.rows] == [0, 1, 2] and stopped.checkpoints == [2]
    assert not (stopped.folder / "summary.json").exists()
    assert_same_runs(interrupted("stopped", "--resume", at=IN_ITERATION_3, every=0), whole)


def test_kill_and_resume(interrupted, folder, whole):
    """Three times: in iteration 4, then in iteration 3, which is on record already and done again
    after iteration 2, then in 4."""
    kills = {
        "at": [IN_ITERATION_4, IN_ITERATION_4 + 3, IN_ITERATION_4 + 7],
        "signal_name": "SIGKILL",
    }
    for resume, last in (([], 3), (["--resume"], 2), (["--resume"], 3)):
        with pytest.raises(AssertionError, match=f"status -{int(signal.SIGKILL)}"):
            interrupted("killed", *resume, **kills)
        killed = Run(folder / "killed")
        assert [row["iteration"] for row in killed.rows] == list(
            range(last + 1)
        ) and killed.checkpoints == [2]
    assert_same_runs(interrupted("killed", "--resume", **kills), whole)


def test_resume_after_a_damaged_checkpoint(interrupted, folder, whole):
    """As a crash can leave it: the newest checkpoint cut short, a half-written row, a half-written
    folder."""
    shutil.copytree(whole.folder, folder / "damaged")
    counter = {"counter": str(folder / "whole.count"), "at": 10**9, "signal_name": "SIGTERM"}
    damaged = folder / "damaged"
    weights = damaged / "checkpoints/000004/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (damaged / "checkpoints/.saving-000004").mkdir()
    with open(damaged / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "rew')
    resumed = train_checked(folder, "damaged", ["--resume"], counter, 2)
    assert (
        "checkpoint 000004 is skipped" in resumed.done.stdout
        and "weights.safetensors has" in resumed.done.stdout
    )
    assert_same_runs(resumed, whole)


def test_stop_and_resume_under_zero(folder):
    """Two processes, ZeRO-3, a signal to the second of them only: all stop together, and go on as
    if they had not."""
    layout = {"processes": 2, "rank": 1, "zero_optimization": ZERO[3]}

    def start(name, *more, at):
        reward = {"counter": str(folder / f"{name}.count"), "at": at}
        return train_checked(folder, name, more, reward, 0, **layout)

    undisturbed = start("zero3-whole", at=10**9)
    stopped = start("zero3-stopped", at=3)
    assert [row["iteration"] for row in stopped.rows] == stopped.checkpoints or len(
        stopped.rows
    ) < 5
    assert_same_runs(start("zero3-stopped", "--resume", at=3), undisturbed)


def test_a_run_that_its_rule_stops(folder):
    """It saves, says why and finishes; resumed it stays stopped, until the rule is taken away."""
    small = {
        "rollout": {"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
        "rewards": {"engine_rewards:contrast": 1.0, "jpeg": 0},
    }

    def start(*more, iterations=5, patience=2):
        # there never is a new best
        stop = patience and {"metric": "eval/jpeg", "patience": patience, "min_delta": 1e6}
        return train(
            folder,
            "ruled",
            *more,
            processes=None,
            training={"iterations": iterations},
            eval={"every": 1, "prompts": 2, "stop": stop},
            **small,
        )

    run = start()
    reason = json.loads((run.folder / "summary.json").read_text())["stopped"]
    assert "eval/jpeg" in reason and "at iteration 0 for 2 evaluations" in reason
    assert (
        f"stopped after iteration 2 by {reason}" in run.done.stdout
        and "stopped early" in (run.folder / "report.html").read_text()
    )
    assert run.checkpoints == [2] and [row["iteration"] for row in run.rows] == [0, 1, 2]
    assert all("eval/jpeg" in row and "reward/jpeg" not in row for row in run.rows)
    assert run.done.stdout.count("iteration 2/5") == 1, (
        "the evaluation that stopped it was the last"
    )

    again = start("--resume")
    assert f"by {reason}" in again.done.stdout and again.checkpoints == [2]
    assert "iteration 3/5" in start("--resume", patience=3).done.stdout and again.checkpoints == [
        2,
        3,
    ]
    assert (
        "stopped" not in start("--resume", patience=None, iterations=4).done.stdout
        and again.rows[-1]["iteration"] == 4
    )


# ----------------------------------------------------------------------------------- other settings
@pytest.mark.parametrize("plan", ["flow_grpo", "mix_grpo"])
def test_plans_without_branches_train_alike(folder, plan):
    run = train(
        folder,
        plan,
        processes=None,
        rollout={"plan": plan_table(plan, seeds=2, branch_steps="all", window=3), "sde": "cps"},
        training={
            "advantage": {"over": "prompt"},
            "iterations": 1,
            "objective": {"ratio": "guard"},
            "updates": {"passes": 2},
        },
        eval={"every": 0},
    )
    (row,) = [row for row in run.rows if row["iteration"] == 1]
    steps = 9 if plan == "flow_grpo" else 3
    assert (
        row["images"] == 4
        and row["forwards/rollout"] == 40
        and row["forwards/train"] == 2 * 4 * steps
    )
    assert row["ratio/max_dev"] > 0 and row["grad_norm"] > 0
    assert [key for key in row if key.startswith("reward_std/")] == [
        f"reward_std/step_{k}" for k in range(steps)
    ]


@pytest.mark.parametrize(
    "name, steps", [("flux_first", [0, 2]), ("flux_lora", "all"), ("flux_zero3", "all")]
)
def test_flux_configs_run_on_the_small_model(folder, name, steps):
    """The configs for FLUX.1-dev, but for the model, the size and the amounts: half precision,
    ZeRO, checkpointing."""
    settings = {
        "model.path": str(MODEL),
        "model.max_sequence_length": 20,
        "data.prompts_per_iteration": 1,
        "rollout.height": 32,
        "rollout.width": 96,
        "rollout.num_steps": 4,
        "rollout.guidance_scale": 0.0,  # the small model takes none, like FLUX.1 [schnell]
        "rollout.plan.branch_steps": steps,
        "rollout.plan.seeds": 1,
        "rollout.plan.children": 2,
        "rewards": {"engine_rewards:contrast": 1.0},
        "reward_pool.workers": 0,
        "training.iterations": 1,
        "eval.prompts": 2,
        "eval.num_steps": 2,
        "logging.dir": str(folder),
        "logging.tensorboard": False,
        "data.embedding_cache": str(folder / "cache"),
    }
    pairs = [
        part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    run = Run(
        folder / name, script_here("train", "--config", ROOT / f"configs/{name}.json", *pairs)
    )
    row = run.rows[-1]
    assert row["iteration"] == 1 and row["grad_norm"] > 0
    assert "warning" not in run.done.stdout
