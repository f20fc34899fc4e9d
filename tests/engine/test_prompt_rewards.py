"""A run whose prompts say which rewards are for them."""

import json

import pytest
from run_cases import train


@pytest.mark.slow
@pytest.mark.parametrize("of", ["group", "gdpo"])
def test_a_run_with_prompts_for_different_rewards(tmp_path, of):
    """Metrics of each reward are over its prompts, nothing counts as failed, and both kinds of
    prompts are trained on."""
    lines = [
        {"prompt": f"a {word}", "rewards": [name]}
        for word, name in (("cat", "left"), ("dog", "red"), ("tree", "left"))
    ]
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewards = {
        "left": {"type": "engine_rewards:contrast"},
        "red": {"type": "engine_rewards:warmth", "weight": 0.01},
    }
    run = train(
        tmp_path,
        "kinds",
        processes=None,
        rewards=rewards,
        rollout={"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
        data={name: str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")}
        | {"prompts_per_iteration": 3},
        training={"iterations": 1, "advantage": {"type": of, "global_std": True}},
        eval={"every": 1},
    )
    base, row = run.rows
    assert (
        base["eval/scored"],
        base["eval/failed"],
        base["eval/left/scored"],
        base["eval/red/scored"],
    ) == (3, 0, 2, 1)
    assert (
        base["eval/left/failed"] == base["eval/red/failed"] == 0 and "eval/red/stderr" not in base
    )
    total = 2 * base["eval/left"] + 0.01 * base["eval/red"]
    assert base["eval/reward"] == pytest.approx(total / 3, rel=1e-5)
    assert (
        row["reward/failed"] == 0
        and {"reward/left", "reward/red"} <= row.keys()
        and row["forwards/train"] == 3 * 2 * 2
    )
    items = json.loads((run.folder / "samples/000000/samples.json").read_text())["items"]
    assert [list(item["rewards"]) for item in items] == [["left"], ["red"], ["left"]]
