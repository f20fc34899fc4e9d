"""docs/migration.md: its config is one, it misses no key of the peers, and the keys that it names
of ours exist."""

import inspect
import json
import pkgutil
import re

import pytest
from engine_cases import ROOT

from tempflow.config import Config, Lora, parse_config
from tempflow.registry import IN_CONFIG, KINDS

PAGE = (ROOT / "docs/migration.md").read_text()

# Flow-GRPO: config/base.py, and what the image recipes of config/grpo.py add. Flow-Factory:
# examples/grpo/lora/flux1/default.yaml.
FLOW_GRPO = """run_name debug num_epochs resume_from seed logdir save_freq eval_freq num_checkpoint_limit mixed_precision allow_tf32
use_lora dataset resolution activation_checkpointing fsdp_optimizer_offload pretrained.model pretrained.revision sample.num_steps
sample.eval_num_steps sample.guidance_scale sample.eval_guidance_scale sample.train_batch_size sample.num_image_per_prompt
sample.test_batch_size sample.num_batches_per_epoch sample.global_std sample.noise_level sample.same_latent sample.sde_window_size
sample.sde_window_range train.batch_size train.use_8bit_adam train.learning_rate train.adam_beta1 train.adam_beta2
train.adam_weight_decay train.adam_epsilon train.gradient_accumulation_steps train.max_grad_norm train.num_inner_epochs train.cfg
train.adv_clip_max train.clip_range train.clip_range_lt train.clip_range_gt train.timestep_shift train.timestep_fraction train.beta
train.lora_path train.ema prompt_fn prompt_fn_kwargs reward_fn save_dir per_prompt_stat_tracking sample.batch_size
sample.mini_num_image_per_prompt sample.train_num_steps sample.sde_type sample.kl_reward sample.sample_time_per_prompt train.sft
train.sft_batch_size diffusion_loss frames height width"""
FLOW_FACTORY = """launcher config_file num_processes main_process_port mixed_precision data.datasets data.preprocessing_batch_size
data.dataloader_num_workers sampler_type model.finetune_type model.lora_rank model.lora_alpha model.target_modules
model.model_name_or_path model.model_type model.resume_path model.resume_type log.run_name log.project log.logging_backend log.save_dir
log.save_freq log.save_model_only train.trainer_type train.reward_optimization_overlap train.advantage_aggregation train.clip_range
train.adv_clip_range train.kl_type train.kl_beta train.ref_param_device train.resolution train.num_inference_steps
train.guidance_scale train.per_device_batch_size train.group_size train.global_std train.unique_sample_num_per_epoch
train.gradient_step_per_epoch train.gradient_accumulation_steps train.ema_decay train.ema_update_interval train.ema_device
train.enable_gradient_checkpointing train.seed scheduler.dynamics_type scheduler.noise_level scheduler.num_sde_steps
scheduler.sde_steps scheduler.seed eval.resolution eval.per_device_batch_size eval.guidance_scale eval.num_inference_steps
eval.eval_freq eval.seed rewards eval_rewards optimizers.learning_rate optimizers.weight_decay optimizers.betas optimizers.eps
optimizers.max_grad_norm"""


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]


def test_the_example_is_a_config():
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    config = parse_config(json.loads(text))
    assert config.rollout.plan["type"] == "flow_grpo" and config.plan().steps(0) == list(range(9))


@pytest.mark.parametrize(
    "heading, keys", [("Flow-GRPO: ", FLOW_GRPO), ("Flow-Factory: ", FLOW_FACTORY)]
)
def test_every_key_of_theirs_is_mapped(heading, keys):
    named = set(re.findall(r"`([\w.]+)`", " ".join(row[0] for row in rows(heading))))
    assert set(keys.split()) <= named


@pytest.mark.parametrize(
    "heading", ["Flow-GRPO: ", "The paper's", "Flow-Factory: ", "verl-omni: ", "UniRL: "]
)
def test_every_key_of_ours_exists(heading):
    for row in rows(heading):
        assert len(row) == 5, row
        for name in re.findall(r"`([a-z_.]+)`", row[2]):
            section, _, rest = name.partition(".")
            assert section in Config.model_fields, name
            if rest and section != "deepspeed":
                owner, key = (
                    (Lora, rest.removeprefix("lora."))
                    if rest.startswith("lora.")
                    else (None, rest.split(".")[0])
                )
                owner = owner or Config.model_fields[section].annotation
                assert key in owner.model_fields, name
                option = rest.partition(".")[2]
                if f"{section}.{key}" in IN_CONFIG and option not in ("", "type"):
                    kind = KINDS[IN_CONFIG[f"{section}.{key}"]]
                    assert any(
                        option in inspect.signature(pkgutil.resolve_name(path)).parameters
                        for path in kind.ids.values()
                    ), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w.]+\.md)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
