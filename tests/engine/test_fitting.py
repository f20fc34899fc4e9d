"""What the dry run proposes where a run does not fit its card."""

import io
from dataclasses import replace

import pytest
from engine_cases import small_config, write_config
from rich.console import Console
from run_cases import script_here

from tempflow.config.deepspeed import check_deepspeed
from tempflow.errors import UserError
from tempflow.estimate import estimate, propose, show_proposal
from tempflow.estimate.fitting import Step, _needed, changed, options

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
    """With room to spare, and the config with all changes is what the last step says; without any
    one of them there is no room."""
    config = changed(CONFIG, {"rollout.decode_batch": 2000})  # more than all that is always there
    whole = estimate(config).total
    resident = sum(item.bytes for item in estimate(config).memory.resident)
    card = round((resident + (whole - resident) / 3) / 0.95)
    assert card < whole
    steps = proposed(config, card)
    assert steps and steps[-1].estimate.has_room
    everything = {key: value for step in steps for key, value in step.changes.items()}
    assert judge_of(card)(changed(config, everything)).total == steps[-1].estimate.total
    assert steps[-1].estimate.total <= 0.95 * card
    for step in steps:
        others = {
            key: value
            for other in steps
            if other is not step
            for key, value in other.changes.items()
        }
        assert not others or not judge_of(card)(changed(config, others)).has_room
    assert keys(steps) <= {
        "rollout.decode_batch",
        "rollout.micro_batch",
        "training.micro_batch",
    }, "rows are cheaper than copies"


def test_of_several_values_the_first_that_suffices_stays():
    """Fewer rows than another change leaves necessary are given back."""
    config = changed(CONFIG, {"rollout.decode_batch": 2000})
    rows = [{"rollout.decode_batch": n} for n in (1000, 500, 250)]
    other = {"model.gradient_checkpointing": True}  # saves nothing here, so it is left out
    card = round(judge_of(1)(changed(config, {**rows[0], **other})).total / 0.95) + 1
    judge = judge_of(card)
    final = judge(changed(config, {**rows[2], **other}))
    steps = [Step(change, "rows", final) for change in rows] + [Step(other, "other", final)]
    assert [step.changes for step in _needed(config, steps, judge)] == [rows[0]]


def said(config, card, steps) -> str:
    out = io.StringIO()
    show_proposal(judge_of(card)(config), steps, Console(file=out, width=300))
    return out.getvalue()


@pytest.fixture(scope="module")
def nearest():
    """All that saves memory."""
    return proposed(CONFIG, 1000)


def test_where_nothing_fits_the_nearest_is_said(nearest):
    """No key is given twice, and from the proposed config nothing more is saved."""
    steps = nearest
    assert steps and not steps[-1].estimate.fits
    assert {"model.lora", "model.dtype", "deepspeed.bf16"} <= keys(steps), "all that saves"
    every = [key for step in steps for key in step.changes]
    assert len(every) == len(set(every)) and all(step.changes for step in steps)
    text = said(CONFIG, 1000, steps)
    assert "No changes that the dry run knows make it fit 1.0 kB. These come nearest" in text
    assert "--set 'model.lora={}'" in text
    last = changed(CONFIG, {key: value for step in steps for key, value in step.changes.items()})
    again = proposed(last, 1000)
    least = again[-1].estimate.total if again else steps[-1].estimate.total
    assert least == pytest.approx(steps[-1].estimate.total, rel=0.01)
    assert "No change that the dry run knows makes it fit 1.0 kB" in said(last, 1000, [])


def test_a_proposal_that_barely_fits_says_so(nearest):
    """Where no change leaves 5 % of the card."""
    card = round(nearest[-1].estimate.total / 0.97)
    steps = [replace(one, estimate=replace(one.estimate, card=card)) for one in nearest]
    assert steps[-1].estimate.fits and not steps[-1].estimate.has_room
    assert "It barely fits" in said(CONFIG, card, steps)


def test_adapters_share_their_base_instead_of_stage_3():
    """Which holds a part of the base and a whole copy of it; also where full training becomes
    adapters, with their own reference."""
    zero = {"zero_optimization": {"stage": 3}}
    one, other = (option for option in options(1) if "adapters" in option.cost)
    adapters = small_config(model={"lora": {}}, deepspeed=zero)
    full = small_config(
        deepspeed=zero, training={"penalty": {"coef": 0.1}, "reference": "offloaded"}
    )
    stage = {"deepspeed.zero_optimization.stage": 2}
    assert one.changes(adapters, estimate(adapters)) == stage
    expected = {"model.lora": {}, "training.reference": None, **stage}
    assert other.changes(full, estimate(full)) == expected
    assert one.changes(full, estimate(full)) is None
    shared = changed(full, expected)
    assert one.changes(shared, estimate(shared)) is None
    assert estimate(changed(adapters, stage)).total < estimate(adapters).total


def test_a_rollout_copy_goes_with_its_graphs():
    graphs = small_config(rollout={"graphs": True})
    option = next(o for o in options(1) if "rollouts run the training engine" in o.cost)
    without = changed(graphs, option.changes(graphs, estimate(graphs)))
    assert not without.rollout.replica and not without.rollout.graphs
    assert option.changes(without, estimate(without)) is None


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
