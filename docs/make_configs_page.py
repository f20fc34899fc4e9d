"""Writes docs/configs.md, which says where the values of the shipped configs come from:
python docs/make_configs_page.py

This file has the published values and a reason for each key. The values of the configs, and whether
they are the published ones, are read from the configs.
"""

from __future__ import annotations

import json
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
TARGET = Path(__file__).with_name("configs.md")

COMMON = {
    "rollout.plan.type": "tempflow",
    "rollout.num_steps": 10,
    "rollout.plan.seeds": 4,
    "rollout.plan.children": 6,
    "rollout.plan.branch_steps": "all",
    "rollout.sde.type": "flow",
    "data.prompts_per_iteration": 12,
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "training.updates.passes": 1,
    "training.updates.parts": 2,
    "training.advantage.type": "group",
    "training.advantage.over": "seed",
    "training.advantage.clip": 5.0,
    "training.objective.type": "grpo",
    "training.objective.clip_low": 1e-4,
    "training.objective.clip_high": 1e-4,
    "training.weighting": "noise",
    "training.penalty.type": "kl",
    "training.penalty.coef": 0.004,
    "training.penalty.form": "x",
    "training.ema.decay": 0.9,
    "training.ema.every": 8,
    "deepspeed.optimizer.type": "AdamW",
    "deepspeed.optimizer.params.lr": 3e-4,
    "deepspeed.optimizer.params.betas": [0.9, 0.999],
    "deepspeed.optimizer.params.eps": 1e-8,
    "deepspeed.optimizer.params.weight_decay": 1e-4,
    "deepspeed.gradient_clipping": 1.0,
}
FLUX = COMMON | {
    "rollout.height": 1024,
    "rollout.width": 1024,
    "rollout.sde.eta": 0.9,
    "rollout.guidance_scale": 3.5,
    "eval.num_steps": 50,
}
SD35 = COMMON | {
    "rollout.height": 512,
    "rollout.width": 512,
    "rollout.sde.eta": 0.7,
    "rollout.guidance_scale": 4.5,
    "eval.num_steps": 40,
}
# Flow-GRPO's own recipes for these models (counting_flux_kontext, counting_qwenimage_edit), where
# they say something; the rest is as above.
KONTEXT = COMMON | {
    "rollout.height": 512,
    "rollout.width": 512,
    "rollout.num_steps": 6,
    "rollout.sde.eta": 0.9,
    "rollout.guidance_scale": 2.5,
    "eval.num_steps": 28,
    "rewards.clip_image.weight": 0.5,
}
QWEN_EDIT = KONTEXT | {
    "rollout.num_steps": 10,
    "rollout.sde.eta": 1.0,
    "rollout.guidance_scale": 4.0,
    "eval.num_steps": 50,
    "rewards.clip_image.weight": 0.2,
}
# Flow-Factory's recipe for Z-Image (examples/grpo/lora/z_image), which has no penalty and another
# plan; the rest is as above.
Z_IMAGE = {
    key: value
    for key, value in COMMON.items()
    if not key.startswith(("rollout.plan", "training.penalty"))
} | {
    "rollout.height": 512,
    "rollout.width": 512,
    "rollout.sde.eta": 0.7,
    "rollout.guidance_scale": 4.0,
    "eval.num_steps": 40,
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
}
# What Flow-GRPO's own config for the model has, config/grpo.py, general_ocr_wan2_1; its sampling is
# another.
WAN = {
    "rollout.height": 240,
    "rollout.width": 416,
    "rollout.frames": 33,
    "rollout.guidance_scale": 4.5,
    "rollout.sde.type": "flow",
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "training.updates.passes": 1,
    "training.objective.type": "grpo",
    "training.objective.clip_low": 1e-3,
    "training.objective.clip_high": 1e-3,
    "training.penalty.type": "kl",
    "training.penalty.coef": 0.004,
    "training.penalty.form": "x",
    "training.advantage.clip": 5.0,
    "training.ema.decay": 0.9,
    "training.ema.every": 8,
    "deepspeed.optimizer.type": "AdamW",
    "deepspeed.optimizer.params.lr": 1e-4,
    "deepspeed.optimizer.params.betas": [0.9, 0.999],
    "deepspeed.optimizer.params.eps": 1e-8,
    "deepspeed.optimizer.params.weight_decay": 1e-4,
    "deepspeed.gradient_clipping": 1.0,
    "eval.num_steps": 50,
}

# Flow-Factory's recipe for Wan 2.2 A14B (examples/grpo/lora/wan22/t2v.yaml), which has another plan,
# another size and no penalty.
WAN22 = {
    "rollout.num_steps": 10,
    "rollout.guidance_scale": 4.0,
    "rollout.guidance_scale_2": 3.0,
    "rollout.sde.type": "flow",
    "rollout.sde.eta": 0.9,
    "rollout.frames": 5,
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "training.updates.parts": 2,
    "training.objective.type": "grpo",
    "training.objective.clip_low": 1e-4,
    "training.objective.clip_high": 1e-4,
    "training.advantage.clip": 5.0,
    "training.ema.decay": 0.9,
    "training.ema.every": 4,
    "deepspeed.optimizer.type": "AdamW",
    "deepspeed.optimizer.params.lr": 1e-4,
    "deepspeed.optimizer.params.betas": [0.9, 0.999],
    "deepspeed.optimizer.params.eps": 1e-8,
    "deepspeed.optimizer.params.weight_decay": 1e-4,
    "deepspeed.gradient_clipping": 1.0,
    "eval.num_steps": 28,
}

SHIPPED = {  # config: (what it is for, the published values with which it is compared)
    "flux_zero3": ("FLUX.1-dev, all weights, one node of 8 GPUs with 80 GB", FLUX),
    "flux_lora": ("FLUX.1-dev, LoRA, one GPU with 80 GB", FLUX),
    "flux_lora_48gb": ("the same, one GPU with 48 GB", FLUX),
    "flux_lora_24gb": (
        "the same at 512 px, its frozen weights in 4 bits, one GPU with 24 GB",
        FLUX,
    ),
    "flux_first": (
        (
            "FLUX.1-dev, LoRA, one GPU with 48 GB or more: a first run, with a curve in an hour on"
            " one with 80 GB (below)"
        ),
        FLUX,
    ),
    "flux_control_lora": (
        (
            "FLUX.1-Depth-dev, LoRA, one GPU with 80 GB; untuned: the settings are FLUX.1-dev's,"
            " guidance and steps of evaluations those of public examples for it (FLUX.1-Canny-dev:"
            " 30 and 50)"
        ),
        FLUX,
    ),
    "sd35_zero2_lora": ("Stable Diffusion 3.5-medium, LoRA, one node of up to 8 GPUs", SD35),
    "sd35_lora": ("the same, one GPU", SD35),
    "qwen_image_lora": ("Qwen-Image, LoRA, one GPU with 80 GB", SD35),
    "flux2_klein_lora": ("FLUX.2 [klein] base 4B, LoRA, one GPU with 48 GB", SD35),
    "kontext_lora": ("FLUX.1-Kontext-dev, edits of images, LoRA, one GPU with 80 GB", KONTEXT),
    "qwen_image_edit_lora": (
        (
            "Qwen-Image-Edit-2509, edits of images, LoRA, one GPU with 80 GB; the judge's server is"
            " elsewhere"
        ),
        QWEN_EDIT,
    ),
    "z_image_lora": ("Z-Image, LoRA, one GPU with 48 GB", Z_IMAGE),
    "wan21_1b_lora": (
        (
            "Wan2.1 1.3B, text to video, LoRA, one GPU with 24 GB; with `model.path` Wan2.1 14B,"
            " one with 80 GB"
        ),
        WAN,
    ),
    "wan22_a14b_lora": (
        (
            "Wan2.2 A14B with both its experts, text to video, LoRA, one GPU with 80 GB or several:"
            " 71.6 GB by the dry run; on 8 GPUs with `zero_optimization.stage=3` and"
            " `rollout.replica=false` 17.9 GB each; untuned"
        ),
        WAN22,
    ),
    "qwen_image_21_lora": (
        (
            "Qwen-Image 2.1, LoRA, one GPU with 48 GB; untuned: the settings are Qwen-Image's,"
            " without guidance as its authors sample it"
        ),
        SD35,
    ),
    "tiny_ocr": ("the small model that ships with the project, a CPU of 2 cores", SD35),
}

# What `python engine/train.py --config configs/flux_first.json --dry-run --mfu 0.3` prints;
# tests/engine/test_dryrun.py checks it.
FIRST = {
    "mfu": 0.3,
    "tflops": 297,
    "gb": 33.6,
    "forwards": 472,
    "tflop": 21.5,
    "rollout": 34.2,
    "decode": 0.6,
    "reference": 0.9,
    "old policy": 0.4,
    "training": 2.7,
    "evaluation": 23.2,
}

WHY = {
    "model.path": "Hub ids; the small model is a folder in this repository.",
    "model.dtype": (
        "bfloat16, in which the checkpoints are published; `auto` computes in bfloat16 if the CPU"
        " supports it."
    ),
    "model.gradient_checkpointing": (
        "Without it, the activations of a single 1024 px forward fill a card. It makes training a"
        " third more expensive, and training is a tenth of an iteration there."
    ),
    "model.quantize": "flux_lora_24gb: the frozen base fits the card only in 4 bits.",
    "model.lora.rank": (
        "With full weights there is no LoRA. Qwen-Image: as for the others. Z-Image:"
        " Flow-Factory's recipe. Wan 2.2: half its recipe's rank, because the training states of"
        " two experts' adapters would take 5 GB more and not fit the card."
    ),
    "model.lora.alpha": (
        "As above. The targets are the families' own lists, which are the paper's for FLUX and"
        " SD3.5, and Flow-Factory's for Z-Image."
    ),
    "model.max_sequence_length": (
        "SD3.5's own default. Qwen-Image pads to this length, so half its default halves the cost"
        " of the text. The small model was trained on 20 characters."
    ),
    "data.train": (
        "The shipped prompts ask for a word, for the OCR reward, which needs no further model. Use"
        " your own. Editing and control: the shipped scenes and depth maps, which only show that a"
        " run works."
    ),
    "data.heldout": (
        "Words that are not trained on. Editing and control: scenes that are not trained on."
    ),
    "data.embedding_cache": (
        "T5-XXL or Qwen2.5-VL is freed from the GPU once the prompts are embedded; the small"
        " model's encoders take little memory. FLUX.2: 7.9 MB per prompt, 36 GB for the shipped"
        " words. Wan: 4.2 MB per prompt."
    ),
    "data.prompts_per_iteration": (
        "With 4 seeds these are the paper's 48 groups per iteration. Qwen-Image costs four times"
        " as much, so it has a third of them; flux_first: 4, which fit into an hour; tiny_ocr has"
        " one seed, so 8 groups, which two CPU cores roll out in seconds. FLUX.2: as Qwen-Image,"
        " since cards of 48 GB are slower. Editing: fewer, since a condition image of a megapixel"
        " has four times the tokens of the output. Wan: 16 groups, 4 minutes on an H100 by the dry"
        " run."
    ),
    "rollout.plan.type": "Trunks with children at every branch step.",
    "rollout.height": (
        "flux_first: a quarter of the pixels takes a quarter of the time; Qwen-Image: below its"
        " native 1328, to save time; tiny_ocr: the size that the small model makes. FLUX.2: between"
        " the 384 and 1024 of Flow-Factory's training and evaluation. Wan: half its native 480, as"
        " in Flow-GRPO's config for it."
    ),
    "rollout.width": "As above.",
    "rollout.frames": (
        "Wan: two seconds at its 16 frames per second, as in Flow-GRPO's config for it. The recipe"
        " for Wan 2.2 has 5."
    ),
    "rollout.num_steps": (
        "Training needs the order of the rewards, not the best images. Editing: Flow-GRPO's"
        " recipes for these models. For Wan, Flow-GRPO takes 20 steps and Flow-Factory 10."
    ),
    "rollout.plan.seeds": (
        "flux_first, tiny_ocr: one seed for each of more prompts covers more words in the same"
        " time."
    ),
    "rollout.plan.children": (
        "An advantage is normalized over the rewards of the six children of a state. Wan: four,"
        " because a video costs more than an image."
    ),
    "rollout.plan.branch_steps": (
        "Every step but the last, which takes no noise. flux_first: three steps, spread over the"
        " grid, for 2.4 times fewer forwards. tiny_ocr: the steps at which its rewards spread,"
        " except the first, which decides colors."
    ),
    "rollout.sde.type": "The stochastic step of Flow-GRPO.",
    "rollout.sde.eta": (
        "The noise of a step: enough to change the image, but not to destroy it. Editing: as in"
        " Flow-GRPO's recipes."
    ),
    "rollout.guidance_scale": (
        "FLUX takes it as an input (flux_control_lora: that of public examples); for SD3.5 and"
        " Qwen-Image it doubles the rows of each forward. Qwen-Image: its authors'"
        " `true_cfg_scale`. The small model has no guidance. FLUX.2 [klein] base: diffusers'"
        " example, and Flow-Factory's recipe for it. Z-Image: the recipe's, and its authors'"
        " example; for Turbo set 0. Wan: Flow-GRPO's; the pipeline's default is 5."
    ),
    "rollout.guidance_scale_2": "Wan 2.2: for the expert for low noise, as in the recipe.",
    "rollout.micro_batch": (
        "The largest for which the card has memory; `--dry-run` says how much it takes. It changes"
        " only the speed."
    ),
    "rollout.decode_batch": (
        "At 1024 px the decoder needs more memory than the transformer's forward. It changes only"
        " the speed."
    ),
    "rollout.graphs": (
        "A forward is one launch instead of some thousand. Not tried on a GPU yet; a rehearsal at"
        " the start turns it off if it fails."
    ),
    "rollout.suffix.stride": (
        "Longer steps after a child's stochastic step; measured with the small model only, see the"
        " log."
    ),
    "rollout.suffix.exact_steps": "The first step after the stochastic one stays exact.",
    "rewards.jpeg": (
        "flux_first: the size of the image as a JPEG file. It costs nothing and any model can"
        " learn to change it, so a curve that stays flat shows that something is wrong. It says"
        " nothing about quality; use your own reward next."
    ),
    "rewards.edited.type": (
        "A vision-language model is asked whether the instruction was followed. Flow-GRPO's"
        " recipes count objects (GenEval) instead, which needs a detector and a counting task."
    ),
    "rewards.edited.base_url": (
        "Address of a server that you start, for example vLLM with the model below."
    ),
    "rewards.edited.model": "Any model that can compare two images.",
    "rewards.edited.conditions": "The judge also sees the image before the edit.",
    "rewards.edited.weight": "The weight of the task in Flow-GRPO's recipe.",
    "rewards.clip_image.weight": (
        "Similarity to the image before the edit, so that everything else in it is kept; as in"
        " Flow-GRPO's recipes."
    ),
    "rewards.ocr.weight": (
        "The only reward. flux_first: weight 0, so that evaluations show whether words stay"
        " legible."
    ),
    "rewards.ocr.detect": (
        "True finds the text in a large image first; the small model's images contain nothing but"
        " the text."
    ),
    "rewards.ocr.frames": (
        "Wan: the mean over four frames of each video, from the first to the last."
    ),
    "rewards.pickscore.weight": (
        "flux_control_lora: human preference, since the prompts of depth maps ask for no words."
        " The advantages of a single reward do not depend on its weight."
    ),
    "rewards.pickscore.device": "It shares the GPU with the policy and takes 2 GB.",
    "rewards.pickscore.dtype": "Takes half the memory of float32.",
    "reward_pool.workers": (
        "OCR runs on CPU cores beside each GPU. tiny_ocr: two workers, on a machine of two cores,"
        " which shorten the wait for the last images of an iteration. Editing: one, with one CLIP"
        " model."
    ),
    "reward_pool.threads_per_worker": (
        "More workers are better than more threads for images scored one by one. Editing: CLIP"
        " takes images in batches."
    ),
    "training.iterations": (
        "The paper gives no number; watch the held-out reward. flux_first: as many as an hour"
        " allows; tiny_ocr: more than its minutes allow."
    ),
    "training.minutes": "tiny_ocr: the ten minutes that the README promises.",
    "training.updates.passes": (
        "Each state is trained on once. tiny_ocr: twice, since its images cost far more than its"
        " training; the first pass is on-policy, and in the second the ratio and its clip range"
        " begin to matter."
    ),
    "training.updates.parts": (
        "The paper makes two updates per rollout with half of the states each, which costs half as"
        " much as two passes."
    ),
    "training.micro_batch": (
        "As many states per forward as there is memory for activations. It changes only the speed."
        " FLUX: 3 states at 1024 px need little more memory than decoding does anyway, with a third"
        " of the gathers, launches and host reads."
    ),
    "training.advantage.type": "The weighted sum of the rewards, in groups.",
    "training.advantage.over": (
        "All images of a group start from the same noise, so that only the stochastic step is"
        " compared."
    ),
    "training.advantage.clip": "Limits the effect of an outlier in a group.",
    "training.objective.type": "GRPO's clipped loss.",
    "training.objective.clip_low": (
        "Small, because the log-probability is a mean over latent elements. tiny_ocr: larger,"
        " because its latents have few elements. Wan: as in the recipe."
    ),
    "training.objective.clip_high": "As above.",
    "training.weighting": "The weight of a step's loss is proportional to the noise of the step.",
    "training.penalty": (
        "flux_zero3: none, which saves the forwards and the memory of a reference model; to keep"
        " one, see `training.reference` in the [config page](config.md)."
    ),
    "training.penalty.type": (
        "The paper's. tiny_ocr: keeps the colors, which an OCR reward would otherwise change"
        " first; see the log."
    ),
    "training.penalty.coef": "The paper's for HPSv3 and for OCR. tiny_ocr: measured, see the log.",
    "training.penalty.form": "Measured between the means of the steps.",
    "training.ema.decay": "The average is what is evaluated and exported.",
    "training.ema.every": "flux_first: every update, because it makes few updates.",
    "training.merge.last": (
        "tiny_ocr: with `every`, the last sixteen iterations. Merging weights replaces a"
        " learning-rate decay, whatever the length of the run."
    ),
    "training.merge.every": "As above.",
    "training.merge.shape": "Equal weights, which correspond to a linear decay.",
    "training.seed": "Any number.",
    "eval.every": (
        "By the dry run, evaluations take a fiftieth of the time between them for FLUX."
        " flux_first: ten in the run."
    ),
    "eval.num_steps": (
        "As many as users of the model take. flux_first: enough to see the images. Qwen-Image: its"
        " authors' number. FLUX.2: diffusers' example. Wan 2.1: the pipeline's default; 2.2: the"
        " recipe's."
    ),
    "eval.prompts": (
        "The paper does not say. More prompts make the curve less noisy. For Wan, each costs 50"
        " forwards of a video."
    ),
    "checkpoint.every": "The most iterations that a crash can cost.",
    "checkpoint.keep": "The newest two and the best one. flux_first: the newest and the best one.",
    "logging.dir": "In the working directory.",
    "deepspeed.optimizer.type": "As in the paper's code.",
    "deepspeed.optimizer.params.lr": (
        "flux_zero3: a thirtieth of LoRA's, because all weights move; Qwen-Image: a third, for a"
        " model that nobody has tuned in this way; tiny_ocr: measured, see the log. FLUX.2: the"
        " paper's, and that of Flow-Factory's recipe for [klein] base. Wan: Flow-GRPO's."
    ),
    "deepspeed.optimizer.params.betas": (
        "tiny_ocr: its run has fewer updates than 0.999 would average over."
    ),
    "deepspeed.optimizer.params.eps": "AdamW's own default.",
    "deepspeed.optimizer.params.weight_decay": "As in the paper's code.",
    "deepspeed.optimizer.params.torch_adam": (
        "PyTorch's AdamW; DeepSpeed's own is compiled at its first use, and many machines lack a"
        " compiler."
    ),
    "deepspeed.bf16.enabled": "Half the memory; the optimizer keeps fp32 master weights.",
    "deepspeed.data_types.grad_accum_dtype": (
        "In bfloat16, a sum over dozens of micro-batches would lose its small terms."
    ),
    "deepspeed.gradient_clipping": "As in the paper's code.",
    "deepspeed.zero_optimization.stage": (
        "Stage 3 shards 214 GB of weights, gradients and optimizer states over 8 cards. Adapters"
        " are small: stage 1 on one GPU, only for the fp32 master weights, and stage 2 on several."
        " A CPU needs none."
    ),
    "deepspeed.zero_optimization.overlap_comm": (
        "Gradients are communicated while the backward continues."
    ),
    "deepspeed.zero_optimization.contiguous_gradients": (
        "Gradients are copied into one buffer, which avoids fragmentation."
    ),
}

HEAD = """# The shipped configs

Generated by `python docs/make_configs_page.py` from the files in [configs/](../configs) and from the notes in that script.
Keys that a config leaves out have the defaults of the [config page](config.md).

A value in **bold** is a published one; every other value is this project's. The FLUX configs are compared with the values of the
paper's own code for FLUX.1-dev, and most others with its values for SD3.5-medium, although Qwen-Image, FLUX.2 and the small model are
not in the paper. The two configs for editing are compared with Flow-GRPO's recipes for these models, as far as those go, and are
untuned. Z-Image is compared with Flow-Factory's recipe; its plan and penalty are this project's and untuned for it. Wan 2.1 is compared
with Flow-GRPO's own config for it (config/grpo.py, general_ocr_wan2_1), Wan 2.2 with Flow-Factory's recipe
(examples/grpo/lora/wan22/t2v.yaml), which has another plan and size, and no penalty. The values of FLUX.2 and Wan are untuned, since
they have not been run here. If two configs differ for the same model, the key's reason says why.

"""


def first_run() -> str:
    """The section that computes from the dry run's seconds that configs/flux_first.json takes an
    hour."""
    values, f = shipped("flux_first"), FIRST
    iterations, every = values["training.iterations"], values["eval.every"]
    parts = [f["rollout"], f["decode"], f["reference"], f["old policy"], f["training"]]
    evaluations = 1 + -(-iterations // every)
    trained, evaluated = iterations * sum(parts) / 60, evaluations * f["evaluation"] / 60
    return f"""## An hour of flux_first

`python engine/train.py --config configs/flux_first.json --dry-run --mfu {f["mfu"]}` counts {f["gb"]} of 80 GB, and at {f["tflops"]}
TFLOP/s ({f["mfu"]} of an H100's peak):

- an iteration: {f["forwards"]} rollout forwards of {f["tflop"]} TFLOP in {parts[0]} s, decoding {parts[1]} s, the reference policy
  {parts[2]} s, the old policy of the second part {parts[3]} s, training {parts[4]} s; {sum(parts):.1f} s together;
- {iterations} iterations: {trained:.0f} minutes;
- {evaluations} evaluations, one before the first iteration and one every {every}, of {f["evaluation"]} s: {evaluated:.0f} minutes.

The sum is {trained + evaluated:.0f} minutes, which leaves {60 - trained - evaluated:.0f} for loading the model, embedding the prompts and the
rehearsal of graphs. The seconds are numbers of operations divided by the given speed; no GPU has run this config yet. For a faster or
slower card change `training.iterations`.
"""


def leaves(table: dict, prefix: str = "") -> dict:
    """Values by dotted key."""
    found = {}
    for key, value in table.items():
        found |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def shipped(name: str) -> dict:
    """A config's values by dotted key."""
    return {
        key: value
        for key, value in leaves(json.loads((CONFIGS / f"{name}.json").read_text())).items()
        if key != "$schema"
    }


def cell(key: str, values: dict, paper: dict) -> str:
    if key not in values:
        return ""
    value = values[key]
    text = Path(value).name if isinstance(value, str) else json.dumps(value)
    return f"**{text}**" if key in paper and paper[key] == value else text


def page() -> str:
    configs = {name: shipped(name) for name in SHIPPED}
    keys = [key for key in WHY if any(key in values for values in configs.values())]
    lines = [f"- `{name}.json`: {purpose}." for name, (purpose, _) in SHIPPED.items()]
    lines += ["", "| key | " + " | ".join(SHIPPED) + " |", "|---" * (len(SHIPPED) + 1) + "|"]
    lines += [
        f"| `{key}` | "
        + " | ".join(cell(key, configs[name], paper) for name, (_, paper) in SHIPPED.items())
        + " |"
        for key in keys
    ]
    lines += [
        "",
        "## Why",
        "",
        "| key | reason |",
        "|---|---|",
        *(f"| `{key}` | {WHY[key]} |" for key in keys),
    ]
    return HEAD + "\n".join(lines) + "\n\n" + first_run()


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(TARGET)
