"""The JSON config of a run: its keys, their types, defaults and meaning.

Every key is a field below with its help beside it. A component's value is a name or a table; its
options are those of its class, which `tempflow.registry` finds, and after parsing the table holds
all of them. The `deepspeed` section is passed on verbatim, less the batch sizes, which the engine
sets itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tempflow import registry
from tempflow.config.checks import (
    check_adapt,
    check_averages,
    check_compiled,
    check_deepspeed,
    check_eval,
    check_groups,
    check_penalty,
    check_shared_base,
    check_stop,
    check_values,
    check_weighting,
    resolve_components,
)
from tempflow.config.fields import (
    Compile,
    Component,
    Count,
    Fraction,
    Frames,
    Pixels,
    Positive,
    Seconds,
    Section,
    Steps,
    Threads,
)
from tempflow.types import Scales, Size

if TYPE_CHECKING:
    from tempflow.advantages.base import Advantage
    from tempflow.objectives.base import Objective
    from tempflow.penalties import Penalty
    from tempflow.sampling.plans.base import Plan
    from tempflow.sampling.steps import Sde


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="their scale is alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="module names to adapt; null: those of `start`, else the family's own list",
    )
    start: str | None = Field(
        None,
        description=(
            "adapters to begin with: a folder or .safetensors file of diffusers or peft; null: none"
        ),
    )


class Model(Section):
    path: str = Field(description="a diffusers pipeline folder, or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description=(
            "of the frozen parts and the rollout copy; auto: bfloat16 where the hardware"
            " computes it"
        ),
    )
    lora: Lora | None = Field(None, description="null trains all weights of the transformer")
    share_base: bool | None = Field(
        None,
        description=(
            "with LoRA: rollouts read the training engine's own frozen weights and apply the"
            " adapters beside them; false keeps a second copy with the adapters merged; null:"
            " shared below ZeRO stage 3 where `dtype` is the one that is trained in"
        ),
    )
    attention_backend: str | None = Field(
        None, description="a diffusers attention backend; null: diffusers' own choice"
    )
    gradient_checkpointing: bool = Field(
        False, description="trade a second forward for activation memory"
    )
    vae_slicing: bool = Field(
        False, description="decode images one after another: less memory for a decode_batch of many"
    )
    vae_tiling: bool = Field(
        False, description="decode large images in overlapping tiles: less memory, seams may show"
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None,
        description=(
            "text tokens; null: the default of the family's diffusers pipeline "
            "(FLUX.1, FLUX.2, Qwen-Image, Z-Image, Wan 512, SD3.5 256)"
        ),
    )


class HubDataset(Section):
    dataset: str = Field(description="what `datasets.load_dataset` takes: a hub id, or a folder")
    subset: str | None = Field(
        None, description="the dataset's configuration, where it has several"
    )
    split: str = Field("train", description="its split")
    column: str = Field(
        "prompt", description="the column of prompts; `negative_prompt` is read where there is one"
    )
    metadata: list[str] = Field([], description="further columns, for rewards that read them")
    images: list[str] = Field(
        [],
        description=(
            "columns of condition images, for families that edit; decoded at the start and kept"
        ),
    )
    revision: str | None = Field(None, description="commit or tag of a hub dataset")


class Curation(Section):
    spread: Fraction = Field(
        0.1,
        description=(
            "a prompt rests when its rewards spread less than this times the average prompt's,"
            " groups taken alone"
        ),
    )
    rest: Positive = Field(
        10, description="iterations that it is passed over for, before it is tried again"
    )
    prefer: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description=(
            "share of an iteration's prompts that are chosen for the highest spread seen so far,"
            " less its standard error"
        ),
    )


class Data(Section):
    train: str | HubDataset = Field(
        description=(
            "prompt file: .txt, one prompt a line, or .jsonl with `prompt`, `negative_prompt`,"
            " `image` or `images` (paths), and metadata; a folder with train.txt, train.jsonl or"
            " train_metadata.jsonl; or a dataset"
        )
    )
    heldout: str | HubDataset | None = Field(
        None, description="the same for evaluation, fixed during the run; of a folder the test file"
    )
    prompts_per_iteration: Positive = Field(8, description="different prompts drawn per iteration")
    curation: Curation | None = Field(
        None, description="pass over prompts that teach nothing for a while; null: all in turn"
    )
    embedding_cache: str | None = Field(
        None,
        description=(
            "folder of prompt embeddings; the text encoders leave memory once they are computed;"
            " null: they stay"
        ),
    )

    @field_validator("train", "heldout", mode="wrap")
    @classmethod
    def _file_or_dataset(cls, value, read):
        """A table's own errors, and one line for the rest."""
        if isinstance(value, dict):
            return HubDataset.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            allowed = (
                'expected a file, a folder or a table {"dataset": ..., "split": ..., "column": ...}'
            )
            raise PydanticCustomError("prompts", allowed) from None


class Suffix(Section):
    stride: Positive = Field(
        2, description="after its last decision a row takes every stride-th grid point"
    )
    order: Literal[1, 2] = Field(
        2,
        description=(
            "1: one Euler step; 2: extrapolated between forwards, and put right at the next one"
        ),
    )
    exact_steps: Count = Field(
        0, description="steps after the last decision that are taken exactly"
    )
    weights: Literal["same", "float8"] = Field(
        "same",
        description=(
            "float8: a copy of the transformer whose large layers multiply in float8 takes the"
            " others"
        ),
    )
    audit_every: Count = Field(
        0, description="iterations between comparisons with the exact suffix, as metrics; 0: never"
    )

    @model_validator(mode="after")
    def _coarser(self) -> Suffix:
        if self.stride == 1 and self.weights == "same":
            raise ValueError(
                'stride 1 changes nothing; allowed are 2 and more, 1 with weights "float8", or null'
                " for the exact suffix"
            )
        return self


class AdaptNoise(Section):
    step: Fraction = Field(
        0.02, description="how far the noise factor of a step moves in an iteration"
    )
    band: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description=(
            "children count as balanced, and the noise rises, where the shares better and worse"
            " differ by at most this"
        ),
    )


class Adapt(Section):
    steps: Positive | None = Field(
        None,
        description=(
            "branch steps drawn in each iteration, more often where rewards spread; null: all that"
            " the plan has"
        ),
    )
    noise: AdaptNoise | None = Field(
        None,
        description=(
            "calibrate each step's noise by the children better and worse than their state's own"
            " ODE; null: fixed"
        ),
    )

    @model_validator(mode="after")
    def _something(self) -> Adapt:
        if self.steps is None and self.noise is None:
            raise ValueError("set steps, noise or both, or leave it null")
        return self


class Rollout(Section):
    plan: Component = Field("tempflow", description="which rows take noise where")
    height: Pixels = Field(512, description="pixels")
    width: Pixels = Field(512, description="pixels")
    frames: Frames = Field(
        1, description="frames of a video, for families that make videos; 1: an image"
    )
    num_steps: Annotated[int, Field(ge=2, le=1000)] = Field(
        10, description="T, steps of the sampling grid"
    )
    sde: Component = Field("flow", description="the stochastic step")
    jitter: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description=(
            "how far the inner sigmas move at random in each iteration, in halves of the gap to the"
            " nearer neighbor; evaluations keep the checkpoint's own grid"
        ),
    )
    adapt: Adapt | None = Field(
        None,
        description="what the rewards of earlier iterations change in a rollout; null: nothing",
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        3.5, description="as in the diffusers pipeline's call"
    )
    guidance_scale_2: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description=(
            "of the expert for low noise, where the model has two (Wan 2.2); null: guidance_scale"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="most rows in one forward of the rollout; null: measured at the start"
    )
    lanes: Threads | None = Field(
        None,
        description=(
            "parts of a rank's rollout that run side by side, in a thread each; null: on a CPU as"
            " many as cores"
        ),
    )
    decode_batch: Positive = Field(16, description="most latents decoded at once")
    suffix: Suffix | None = Field(
        None, description="coarser steps after a row's last decision; null: the exact ones"
    )
    graphs: bool = Field(
        False,
        description=(
            "replay forwards as CUDA graphs where there is a GPU, after a rehearsal; needs replica"
        ),
    )
    graph_limit_mb: Positive = Field(
        4096, description="device memory for graphs; the least recently used leave beyond it"
    )
    graph_verify: bool = Field(
        True, description="compare every graph's first replay with an eager forward"
    )
    compile: Compile = Field(
        "eager",
        description="torch.compile of the rollout copy's blocks; compile-max tunes kernels too",
    )
    replica: bool = Field(
        True,
        description="roll out on a static copy of the weights, not through the training engine",
    )
    refresh_bucket: Positive = Field(
        100_000_000, description="most weights gathered at a time when that copy is refreshed"
    )

    @property
    def scale(self) -> float:
        """Guidance scale of rollouts; `Scales` where the second expert has its own."""
        return (
            self.guidance_scale
            if self.guidance_scale_2 is None
            else Scales(self.guidance_scale, self.guidance_scale_2)
        )

    @property
    def size(self) -> Size:
        """Of the images or videos that are made, in rollouts and evaluations alike."""
        return Size(self.height, self.width, self.frames)

    @property
    def rows(self) -> int:
        """Most rows in one forward, where nothing was measured yet a guess."""
        return self.micro_batch or 48


class RewardPoolSection(Section):
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="processes per rank; 0 scores in the training process"
    )
    threads_per_worker: Threads = Field(1, description="CPU threads of each")
    timeout_s: Seconds = Field(120.0, description="for one batch of one reward")
    start_timeout_s: Seconds = Field(
        300.0, description="for a worker to load (and download) its rewards' models"
    )
    retries: Count = Field(2, description="further tries of a failed batch")
    max_failed: Fraction = Field(
        0.5,
        description=(
            "share of an iteration's or an evaluation's images that may fail before the run stops"
        ),
    )

    def pool(self) -> dict[str, Any]:
        """What `RewardPool` takes."""
        return self.model_dump(exclude={"max_failed"})


class Ema(Section):
    decay: Fraction = Field(0.9, description="weight of the old average")
    every: Positive = Field(8, description="updates between two averagings")


class Merge(Section):
    last: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="snapshots kept; memory and checkpoints hold each in fp32"
    )
    every: Positive = Field(6, description="updates between two snapshots")
    shape: Literal["sqrt", "mean", "linear"] = Field(
        "sqrt",
        description=(
            "the decay that the sum stands for: 1 - sqrt, or a linear one, whose sum is the mean"
        ),
    )


class Updates(Section):
    passes: Positive = Field(1, description="times that an iteration goes over its states")
    parts: Positive = Field(
        1, description="disjoint shares of the states in a pass, an optimizer step each"
    )


class ValueWeights(Section):
    value: Annotated[float, Field(gt=0, le=1)] = Field(
        description="discount gamma of VGPO; 1: the plain number of steps that are left"
    )


class Training(Section):
    iterations: Positive = Field(100, description="rollouts, each followed by its updates")
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="stop after this much training, if sooner"
    )
    updates: Updates = Field(Updates(), description="optimizer steps of an iteration")
    max_skipped: Count = Field(
        3,
        description=(
            "updates in a row that may be skipped because the gradient is not finite, before the"
            " run stops"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="states in one forward and backward; null: measured at the start"
    )
    advantage: Component = Field("group", description="from rewards to advantages")
    objective: Component = Field("grpo", description="what an update minimizes")
    penalty: Component | None = Field(
        None,
        description=(
            "what holds the policy to the one before training, or to that before an iteration's"
            " updates; null: nothing"
        ),
    )
    weighting: Literal["noise", "uniform", "guard"] | ValueWeights = Field(
        "noise",
        description=(
            "loss weight of a step. noise makes its gradient as large as the step's b, whatever the"
            " objective's ratio; guard as b / dt, about the same for all steps; uniform leaves it;"
            " a table as noise, times the discounted number of steps left"
        ),
    )
    compile: Compile = Field(
        "eager",
        description="torch.compile of the trained transformer's blocks; not with ZeRO stage 3",
    )
    reference: Literal["whole", "sharded", "offloaded"] | None = Field(
        None,
        description=(
            "the reference policy of full fine-tuning: a copy on each GPU, one over all, or one in"
            " host memory; null: sharded at ZeRO stage 3, else whole"
        ),
    )
    ema: Ema | None = Field(
        None, description="average of the trained weights, evaluated and exported where present"
    )
    merge: Merge | None = Field(
        None,
        description=(
            "weighted sum of the last snapshots of the trained weights, in place of a decay and of"
            " `ema`; used as `ema` is"
        ),
    )
    lr_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="learning rate at the end over that at the start, along a cosine; 1: constant",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of prompts and noise")

    @field_validator("weighting", mode="wrap")
    @classmethod
    def _profile_or_table(cls, value, read):
        """A table's own errors, and one line for the rest."""
        if isinstance(value, dict):
            return ValueWeights.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError(
                "weighting", 'expected "noise", "uniform", "guard" or {"value": gamma}'
            ) from None

    def profile(self) -> dict[str, Any]:
        """Which loss weights the steps have: `weighting`, and `gamma` of the profile that has
        it."""
        if isinstance(self.weighting, ValueWeights):
            return {"weighting": "value", "gamma": self.weighting.value}
        return {"weighting": self.weighting}

    @property
    def states(self) -> int:
        """Most states in one forward and backward, where nothing was measured yet a guess."""
        return self.micro_batch or 8


class Stop(Section):
    metric: str = Field(
        description=(
            "a metric of the evaluated iterations: eval/reward, eval/NAME, kl, diversity/seeds,"
            " diversity/children, drift/color_shift, drift/color_spread, drift/diversity,"
            " eval/precision, eval/recall"
        )
    )
    patience: Positive | None = Field(
        None,
        description=(
            "stop after this many evaluations in a row without a new highest value; not where lower"
            " is better"
        ),
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a new highest value is higher than the last by more than this"
    )
    below: float | None = Field(None, description="stop as soon as an evaluation finds it lower")
    above: float | None = Field(None, description="stop as soon as an evaluation finds it higher")


class Eval(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: never")
    num_steps: Steps | None = Field(None, description="ODE steps; null: as in the rollout")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of all experts of the model; null: as in the rollout"
    )
    prompts: Positive = Field(128, description="held-out prompts used, from the top of the file")
    keep_samples: Positive = Field(
        24, description="images written per evaluation, the first prompts'"
    )
    precision_recall: Positive | None = Field(
        None,
        description=(
            "k of the k-nearest-neighbor balls of eval/precision and eval/recall against the base's"
            " images, e.g. 3; null: off"
        ),
    )
    stop: Stop | None = Field(
        None, description="ends the run early by a metric; a checkpoint is saved"
    )


class Checkpoint(Section):
    every: Count = Field(20, description="iterations between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(
        True,
        description=(
            "of those evaluated keep the best as well: by eval/reward, or what eval.stop waits for"
        ),
    )


class Logging(Section):
    dir: str = Field("runs", description="folder of run directories")
    name: str | None = Field(
        None, description="run directory, below `dir`; null: the config file's name"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: dict[str, Any] | None = Field(None, description="arguments of wandb.init, or null")

    @field_validator("dir", "name")
    @classmethod
    def _a_folder(cls, value: str | None, info) -> str | None:
        """A name that leaves logging.dir would put the run where nobody looks for it."""
        if value is None:
            return None
        if not value.strip() or "\0" in value:
            raise PydanticCustomError("folder", "expected the name of a folder")
        path = Path(value)
        if info.field_name == "name" and (
            not path.parts or ".." in path.parts or path.is_absolute()
        ):
            raise PydanticCustomError(
                "folder", "expected a name below logging.dir, without .. and not absolute"
            )
        return value


class Config(Section):
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    rewards: dict[str, Any]
    reward_pool: RewardPoolSection = RewardPoolSection()
    training: Training = Training()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="passed to DeepSpeed as it stands"
    )

    @model_validator(mode="after")
    def _agree(self) -> Config:
        check_deepspeed(self)
        resolve_components(self)
        for check in (
            check_averages,
            check_groups,
            check_values,
            check_adapt,
            check_weighting,
            check_penalty,
            check_compiled,
            check_shared_base,
            check_eval,
            check_stop,
        ):
            check(self)
        return self

    def plan(self) -> Plan:
        """Which latents an iteration integrates, prepared for this run."""
        plan = registry.build("plan", self.rollout.plan)
        with registry.keyed("rollout.plan", type(plan)):
            plan.prepare(self.rollout.num_steps, self.training.seed)
        return plan

    def sde(self) -> Sde:
        """The stochastic step."""
        return registry.build("sde", self.rollout.sde)

    def advantage(self) -> Advantage:
        """From rewards to advantages."""
        return registry.build("advantage", self.training.advantage)

    def objective(self) -> Objective:
        """What an update minimizes."""
        return registry.build("objective", self.training.objective)

    def penalty(self) -> Penalty | None:
        """What holds the policy to another; None: nothing."""
        return registry.build("penalty", self.training.penalty) if self.training.penalty else None

    def may_share_base(self) -> bool:
        """Whether rollouts may read the training engine's frozen weights, if the dtypes of both
        agree."""
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        return (
            self.model.lora is not None
            and self.model.share_base is not False
            and self.rollout.replica
            and stage < 3
        )

    def averaging(self) -> str | None:
        """The key of `training` by which weights are averaged: "ema", "merge" or None."""
        return "ema" if self.training.ema else "merge" if self.training.merge else None

    def averaged_copies(self) -> int:
        """Copies of the trained weights that an average holds between updates."""
        return self.training.merge.last if self.training.merge else 1 if self.training.ema else 0

    def needs_reference(self) -> bool:
        """Whether the policy before training is kept and forwarded."""
        penalty = self.penalty()
        return penalty is not None and penalty.needs_reference

    def eval_guidance(self) -> float:
        """Guidance scale of evaluations."""
        own = self.eval.guidance_scale
        return self.rollout.scale if own is None else own

    def best_metric(self) -> str:
        """Whose highest value makes a checkpoint the best: what `eval.stop` waits to rise, else the
        held-out reward."""
        rule = self.eval.stop
        return rule.metric if rule and rule.patience else "eval/reward"
