"""What the dry run proposes where a run does not fit its card."""

import io

import pytest
from engine_cases import small_config, write_config
from rich.console import Console
from run_cases import script_here

from tempflow.config.deepspeed import check_deepspeed
from tempflow.errors import UserError
from tempflow.estimate import estimate, propose, show_proposal
from tempflow.estimate.fitting import changed, options

pytestmark = pytest.mark.cpu
CONFIG = small_config(
    data={"embedding_cache": "there"},
    rollout={"decode_batch": 16},
    training={"penalty": {"coef": 0.1}},
)


def judge_of(card):
    return lambda config: estimate(config, card_gb=card / 1e9)


def proposed(config, card, gpus=1):
    return propose(config, judge_of(card), gpus)


def keys(steps) -> set[str]:
    return {key for step in steps for key in step.changes}


def test_what_fits_is_left_alone():
    assert proposed(CONFIG, estimate(CONFIG).total) == []


def test_the_proposal_fits_and_each_change_is_needed():
    """The config with all changes is what the last step says; without any one of them it does not
    fit."""
    whole = estimate(CONFIG).total
    resident = sum(item.bytes for item in estimate(CONFIG).memory.resident)
    card = resident + (whole - resident) // 3
    steps = proposed(CONFIG, card)
    assert steps and steps[-1].estimate.fits
    everything = {key: value for step in steps for key, value in step.changes.items()}
    assert judge_of(card)(changed(CONFIG, everything)).total == steps[-1].estimate.total <= card
    for step in steps:
        others = {
            key: value
            for other in steps
            if other is not step
            for key, value in other.changes.items()
        }
        assert not others or not judge_of(card)(changed(CONFIG, others)).fits
    assert keys(steps) <= {
        "rollout.decode_batch",
        "rollout.micro_batch",
        "training.micro_batch",
    }, "rows are cheaper than copies"


def test_where_nothing_fits_the_nearest_is_said():
    steps = proposed(CONFIG, 1000)
    assert steps and not steps[-1].estimate.fits
    assert {"model.lora", "model.dtype", "deepspeed.bf16"} <= keys(steps), "all that saves"
    out = io.StringIO()
    show_proposal(judge_of(1000)(CONFIG), steps, Console(file=out, width=300))
    assert (
        "No change of these keys makes it fit" in out.getvalue()
        and "--set 'model.lora={}'" in out.getvalue()
    )


def test_a_change_that_the_config_refuses_is_passed_over():
    with pytest.raises(UserError):
        changed(CONFIG, {"rollout.replica": False, "rollout.graphs": True})
    graphs = small_config(rollout={"graphs": True, "suffix": {"weights": "float8"}})
    assert not {"rollout.replica"} & keys(proposed(graphs, estimate(graphs).total - 1))


def test_the_command_says_it(tmp_path):
    card = estimate(small_config()).total / 1e9 - 0.01
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run", "--card-gb", card)
    assert done.returncode == 0 and "It fits" in done.stdout and "--set '" in done.stdout, (
        done.stdout + done.stderr
    )


def test_moments_in_8_bit_come_before_the_host():
    """Of full fine-tuning with AdamW; where they are not enough, the host holds AdamW's own."""
    params = {"lr": 1e-4, "torch_adam": True}
    config = small_config(deepspeed={"optimizer": {"type": "AdamW", "params": params}})
    chosen = next(o for o in options(1) if "8 bit" in o.cost).changes(config, estimate(config))
    assert chosen == {"deepspeed.optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-4}}}
    smaller = changed(config, chosen)
    saved = estimate(config).total - estimate(smaller).total
    assert saved == pytest.approx(6 * estimate(config).trained, rel=0.1)
    offloaded = next(o for o in options(1) if "state is in host memory" in o.cost)
    there = changed(smaller, offloaded.changes(smaller, estimate(smaller)))
    assert there.deepspeed["optimizer"] == {"type": "AdamW", "params": params}
    check_deepspeed(there.deepspeed)
