"""The JSON config of a run: its keys, their types, defaults and meaning, and the checks that need no model.

Every key is a field below with its help beside it. Unknown and ill-typed keys are refused with the nearest valid
name. The `deepspeed` section is passed on verbatim, less the batch sizes, which the engine sets itself.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tempflow.config import strict_json
from tempflow.errors import VALUE, UserError, note, shortened, shown
from tempflow.run import places

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # and processes: each is made, whatever the machine has
Seconds = Annotated[float, Field(gt=0, le=1e6)]  # a timer of more than 292 years is an error
Steps = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Compile = Literal["eager", "compile", "compile-max"]


class Section(BaseModel):
    # An empty text (`--set logging.name=$UNSET`) is no name, and is not taken for null.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False, str_min_length=1)


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="their scale is alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="module names to adapt; null: those of `start`, else the family's own list"
    )
    start: str | None = Field(None, description="adapters to begin with: a folder or .safetensors file of diffusers or peft; null: none")


class Model(Section):
    path: str = Field(description="a diffusers pipeline folder, or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen parts and the rollout copy; auto: bfloat16 where the hardware computes it"
    )
    lora: Lora | None = Field(None, description="null trains all weights of the transformer")
    attention_backend: str | None = Field(None, description="a diffusers attention backend; null: diffusers' own choice")
    gradient_checkpointing: bool = Field(False, description="trade a second forward for activation memory")
    vae_slicing: bool = Field(False, description="decode pictures one after another: less memory for a decode_batch of many")
    vae_tiling: bool = Field(False, description="decode large pictures in overlapping tiles: less memory, seams may show")
    max_sequence_length: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None, description="text tokens; null: the default of the family's diffusers pipeline (FLUX.1, Qwen-Image 512, SD3.5 256)"
    )


class HubDataset(Section):
    dataset: str = Field(description="what `datasets.load_dataset` takes: a hub id, or a folder")
    subset: str | None = Field(None, description="the dataset's configuration, where it has several")
    split: str = Field("train", description="its split")
    column: str = Field("prompt", description="the column of prompts; `negative_prompt` is read where there is one")
    metadata: list[str] = Field([], description="further columns, for rewards that read them")
    revision: str | None = Field(None, description="commit or tag of a hub dataset")


class Curation(Section):
    spread: Fraction = Field(
        0.1, description="a prompt rests when its rewards spread less than this times the average prompt's, groups taken alone"
    )
    rest: Positive = Field(10, description="iterations that it is passed over for, before it is tried again")


class Data(Section):
    train: str | HubDataset = Field(
        description="prompt file: .txt, one prompt a line, or .jsonl with `prompt`, `negative_prompt` and metadata; a folder with "
        "train.txt, train.jsonl or train_metadata.jsonl; or a dataset"
    )
    heldout: str | HubDataset | None = Field(
        None, description="the same for evaluation, fixed during the run; of a folder the test file"
    )
    prompts_per_iteration: Positive = Field(8, description="different prompts drawn per iteration")
    curation: Curation | None = Field(None, description="pass over prompts that teach nothing for a while; null: all in turn")
    embedding_cache: str | None = Field(
        None, description="folder of prompt embeddings; the text encoders leave memory once they are computed; null: they stay"
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
            allowed = 'expected a file, a folder or a table {"dataset": ..., "split": ..., "column": ...}'
            raise PydanticCustomError("prompts", allowed) from None


class RandomSteps(Section):
    random: Positive = Field(description="number of branch steps drawn anew each iteration, spread over the grid")


class Window(Section):
    size: Positive = Field(4, description="stochastic steps per iteration of mix_grpo")
    every: Positive = Field(25, description="iterations after which the window moves on by one step")


class Suffix(Section):
    stride: Positive = Field(2, description="after its last decision a row takes every stride-th grid point")
    order: Literal[1, 2] = Field(2, description="1: one Euler step; 2: extrapolated between forwards, and put right at the next one")
    exact_steps: Count = Field(0, description="steps after the last decision that are taken exactly")
    weights: Literal["same", "float8"] = Field(
        "same", description="float8: a copy of the transformer whose large layers multiply in float8 takes the others"
    )
    audit_every: Count = Field(
        0, description="iterations between comparisons with the exact suffix, as metrics; 0: never"
    )

    @model_validator(mode="after")
    def _coarser(self) -> Suffix:
        if self.stride == 1 and self.weights == "same":
            raise ValueError('stride 1 changes nothing; allowed are 2 and more, 1 with weights "float8", or null for the exact suffix')
        return self


class Rollout(Section):
    plan: Literal["tempflow", "flow_grpo", "mix_grpo"] = Field("tempflow", description="which rows take noise where")
    height: Pixels = Field(512, description="pixels")
    width: Pixels = Field(512, description="pixels")
    num_steps: Annotated[int, Field(ge=2, le=1000)] = Field(10, description="T, steps of the sampling grid")
    seeds: Positive = Field(4, description="S, initial noises per prompt")
    children: Annotated[int, Field(ge=1, le=64)] = Field(6, description="B, children per (seed, branch step)")
    branch_steps: Union[Literal["all"], list[Count], RandomSteps] = Field(
        "all", description='steps that take noise: "all" but the last, a list, or {"random": n}'
    )
    window: Window = Field(Window(), description="the stochastic window of mix_grpo")
    sde: Literal["flow", "dance", "cps"] = Field("flow", description="kind of the stochastic step")
    eta: Annotated[float, Field(gt=0)] = Field(0.7, description="noise level of the stochastic step")
    guidance_scale: Annotated[float, Field(ge=0)] = Field(3.5, description="as in the diffusers pipeline's call")
    micro_batch: Positive = Field(48, description="most rows in one forward of the rollout")
    lanes: Threads | None = Field(
        None, description="parts of a rank's rollout that run side by side, in a thread each; null: on a CPU as many as cores"
    )
    decode_batch: Positive = Field(16, description="most latents decoded at once")
    suffix: Suffix | None = Field(None, description="coarser steps after a row's last decision; null: the exact ones")
    graphs: bool = Field(False, description="replay forwards as CUDA graphs where there is a GPU, after a rehearsal; needs replica")
    graph_limit_mb: Positive = Field(4096, description="device memory for graphs; the least recently used leave beyond it")
    graph_verify: bool = Field(True, description="compare every graph's first replay with an eager forward")
    compile: Compile = Field("eager", description="torch.compile of the rollout copy's blocks; compile-max tunes kernels too")
    replica: bool = Field(True, description="roll out on a static copy of the weights, not through the training engine")
    refresh_bucket: Positive = Field(100_000_000, description="most weights gathered at a time when that copy is refreshed")

    @field_validator("branch_steps", mode="wrap")
    @classmethod
    def _one_message(cls, value, read):
        """One line, where pydantic would list what each of the allowed kinds misses."""
        try:
            return read(value)
        except ValidationError:
            allowed = 'expected "all", a list of steps from 0 on, or {"random": n} with n from 1 on'
            raise PydanticCustomError("branch_steps", allowed) from None


class RewardPoolSection(Section):
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(1, description="processes per rank; 0 scores in the training process")
    threads_per_worker: Threads = Field(1, description="CPU threads of each")
    timeout_s: Seconds = Field(120.0, description="for one batch of one reward")
    start_timeout_s: Seconds = Field(300.0, description="for a worker to load (and download) its rewards' models")
    retries: Count = Field(2, description="further tries of a failed batch")
    max_failed: Fraction = Field(0.5, description="share of an iteration's or an evaluation's images that may fail before the run stops")

    def pool(self) -> dict[str, Any]:
        """What `RewardPool` takes."""
        return self.model_dump(exclude={"max_failed"})


class Ema(Section):
    decay: Fraction = Field(0.9, description="weight of the old average")
    every: Positive = Field(8, description="updates between two averagings")


class Training(Section):
    iterations: Positive = Field(100, description="rollouts, each followed by its updates")
    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="stop after this much training, if sooner")
    updates_per_rollout: Positive = Field(1, description="optimizer steps, each over all decisions of the rollout")
    max_skipped: Count = Field(
        3, description="updates in a row that may be skipped because the gradient is not finite, before the run stops"
    )
    micro_batch: Positive = Field(8, description="decisions in one forward and backward")
    advantage_of: Literal["sum", "each"] = Field(
        "sum", description="of the weighted sum of the rewards, or the weighted sum of each reward's own (GDPO)"
    )
    advantage_group: Literal["seed", "prompt"] = Field("seed", description="whose rewards are normalised together")
    global_std: bool = Field(False, description="divide by the whole batch's standard deviation, not the group's")
    adv_clip: Annotated[float, Field(gt=0)] = Field(5.0, description="advantages are clipped to +- this")
    clip_low: Fraction = Field(1e-4, description="the ratio is clipped below at 1 - this")
    clip_high: Annotated[float, Field(gt=0)] = Field(1e-4, description="and above at 1 + this")
    ratio: Literal["plain", "guard"] = Field("plain", description="guard: the normalised ratio of GRPO-Guard")
    weighting: Literal["noise", "uniform"] = Field("noise", description="loss weight of a step: its tau, or 1")
    compile: Compile = Field("eager", description="torch.compile of the trained transformer's blocks; not with ZeRO stage 3")
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="beta; 0 keeps no reference policy")
    reference: Literal["whole", "sharded", "offloaded"] | None = Field(
        None, description="the reference policy of full fine-tuning: a copy on each GPU, one over all, or one in host memory; "
        "null: sharded at ZeRO stage 3, else whole"
    )
    kl_form: Literal["x", "v"] = Field("x", description="KL of step means over tau, or plain velocity distance")
    share_group_forward: bool = Field(True, description="one forward per state; false: one per child, for comparison")
    ema: Ema | None = Field(None, description="average of the trained weights, evaluated and exported where present")
    lr_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="learning rate at the end over that at the start, along a cosine; 1: constant"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of prompts and noise")


class Stop(Section):
    metric: str = Field(description="a metric of the evaluated iterations: eval/reward, eval/NAME, kl, diversity/seeds, diversity/children")
    patience: Positive | None = Field(None, description="stop after this many evaluations in a row without a new highest value")
    min_delta: Annotated[float, Field(ge=0)] = Field(0.0, description="a new highest value is higher than the last by more than this")
    below: float | None = Field(None, description="stop as soon as an evaluation finds it lower")
    above: float | None = Field(None, description="stop as soon as an evaluation finds it higher")


class Eval(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: never")
    num_steps: Steps | None = Field(None, description="ODE steps; null: as in the rollout")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(None, description="null: as in the rollout")
    prompts: Positive = Field(128, description="held-out prompts used, from the top of the file")
    keep_samples: Positive = Field(24, description="pictures written per evaluation, the first prompts'")
    stop: Stop | None = Field(None, description="ends the run early by a metric; a checkpoint is saved")


class Checkpoint(Section):
    every: Count = Field(20, description="iterations between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="of those evaluated keep the best as well: by eval/reward, or what eval.stop waits for")


class Logging(Section):
    dir: str = Field("runs", description="folder of run directories")
    name: str | None = Field(None, description="run directory, below `dir`; null: the config file's name")
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
        if info.field_name == "name" and (not path.parts or ".." in path.parts or path.is_absolute()):
            raise PydanticCustomError("folder", "expected a name below logging.dir, without .. and not absolute")
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
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed to DeepSpeed as it stands")

    @model_validator(mode="after")
    def _agree(self) -> Config:
        for check in (_check_branch_steps, _check_groups, _check_deepspeed, _check_compiled, _check_stop):
            check(self)
        return self

    def eval_guidance(self) -> float:
        """Guidance scale of evaluations."""
        own = self.eval.guidance_scale
        return self.rollout.guidance_scale if own is None else own

    def best_metric(self) -> str:
        """Whose highest value makes a checkpoint the best: what `eval.stop` waits to rise, else the held-out reward."""
        rule = self.eval.stop
        return rule.metric if rule and rule.patience else "eval/reward"

    def steps_with_noise(self) -> list[int]:
        """Every step that the plan may ever make stochastic: all but the last, or the list given."""
        steps = self.rollout.branch_steps
        return steps if isinstance(steps, list) else list(range(self.rollout.num_steps - 1))


def _check_branch_steps(config: Config) -> None:
    r = config.rollout
    last = r.num_steps - 2
    if isinstance(r.branch_steps, list):
        if not r.branch_steps or sorted(set(r.branch_steps)) != r.branch_steps:
            raise ValueError(f"rollout.branch_steps: expected rising steps without repeats, got {r.branch_steps}")
        if r.branch_steps[-1] > last:
            raise ValueError(
                f"rollout.branch_steps: step {r.branch_steps[-1]} is outside the grid; allowed are 0 to {last} "
                f"(num_steps {r.num_steps}, the last step takes no noise)"
            )
    if isinstance(r.branch_steps, RandomSteps) and r.branch_steps.random > last + 1:
        raise ValueError(f"rollout.branch_steps.random: {r.branch_steps.random} of {last + 1} steps")
    if r.plan == "mix_grpo" and r.window.size > last + 1:
        raise ValueError(f"rollout.window.size: {r.window.size} of {last + 1} steps")
    if r.sde == "cps" and r.eta > 1:
        raise ValueError(f"rollout.eta: {r.eta}; cps allows 0 to 1")


def _check_groups(config: Config) -> None:
    r, t = config.rollout, config.training
    branching = r.plan == "tempflow"
    if t.advantage_group == "seed" and not branching:
        raise ValueError(f'training.advantage_group: "seed" groups the children of a branch; plan {r.plan} needs "prompt"')
    size = r.children if t.advantage_group == "seed" else r.seeds * (r.children if branching else 1)
    if size < 2:
        keys = "rollout.children" if branching else "rollout.seeds"
        raise ValueError(f"{keys}: a group of one has no advantage; at least 2 are needed")


def _check_deepspeed(config: Config) -> None:
    ds = config.deepspeed
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in ds:
            raise ValueError(f"deepspeed.{key}: the engine sets it; use training.micro_batch and data.prompts_per_iteration")
    for key in ("optimizer", "bf16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key}: expected a table, got {shown(ds[key])}")
    zero = ds.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:  # true is no stage, though it equals 1
        raise ValueError(f"deepspeed.zero_optimization: expected a table with stage 0, 1, 2 or 3, got {shown(zero)}")
    half = [name for name in ("bf16", "fp16") if isinstance(ds.get(name), dict) and ds[name].get("enabled")]
    if half and zero.get("stage", 0) == 0:
        raise ValueError(
            f"deepspeed.{half[0]}: at ZeRO stage 0 DeepSpeed keeps no fp32 weights to update; set "
            "deepspeed.zero_optimization.stage to 1, 2 or 3"
        )
    if "scheduler" in ds:
        raise ValueError("deepspeed.scheduler: the engine sets the learning rate itself; use training.lr_decay")
    if "optimizer" not in ds:
        raise ValueError('deepspeed.optimizer: missing; for example {"type": "AdamW", "params": {"lr": 1e-4}}')


def _check_compiled(config: Config) -> None:
    if config.rollout.graphs and not config.rollout.replica:
        raise ValueError("rollout.graphs: true needs rollout.replica; graphs read weights from fixed addresses")
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if config.training.compile != "eager" and stage == 3:
        raise ValueError(f"training.compile: {config.training.compile!r}; at ZeRO stage 3 only \"eager\" is allowed")
    if config.training.compile != "eager" and config.training.reference in ("sharded", "offloaded"):
        raise ValueError(f"training.reference: {config.training.reference!r} needs training.compile \"eager\"")
    if (config.rollout.lanes or 1) > 1 and (config.rollout.graphs or not config.rollout.replica):
        raise ValueError("rollout.lanes: with rollout.graphs, or without rollout.replica, only 1 is allowed")
    suffix = config.rollout.suffix
    if suffix and suffix.weights == "float8" and not config.rollout.replica:
        raise ValueError('rollout.suffix.weights: "float8" needs rollout.replica, whose weights it is made from')
    if config.rollout.compile != "eager" and not config.rollout.replica:
        raise ValueError("rollout.compile: without rollout.replica rollouts use training.compile")


def _check_stop(config: Config) -> None:
    rule, r = config.eval.stop, config.rollout
    if rule is None:
        return
    if not config.data.heldout or not config.eval.every:
        raise ValueError("eval.stop: there are no evaluations; set data.heldout and eval.every")
    if rule.patience is None and rule.below is None and rule.above is None:
        raise ValueError("eval.stop: set patience, below or above")
    known = ["eval/reward", *(f"eval/{name}" for name in config.rewards)]
    known += ["kl"] if config.training.kl_coef else []
    known += ["diversity/seeds"] if r.seeds > 1 else []
    known += ["diversity/children"] if r.plan == "tempflow" and r.children > 1 else []
    if rule.metric not in known:
        raise ValueError(f"eval.stop.metric: {shown(rule.metric)}; this run has {', '.join(known)}")


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a JSON config, apply `section.key=value` overrides (JSON values, or bare strings), and check it. Of overrides that
    set one key the last counts, and a note says so.

    Raises UserError naming the key, the value that came and what is allowed.
    """
    file = Path(path)
    data = _read_tables(file)
    if places.STARTED_IN in data:  # a run's own config.json
        places.relocate(data, file.parent)
    data = {key: value for key, value in data.items() if key not in ("$schema", places.STARTED_IN)}  # for editors; for scripts
    _apply_overrides(data, overrides)
    places.expanded(data)
    config = parse_config(data)
    config.model.path = _found_from("model.path", config.model.path, file)
    if config.model.lora and config.model.lora.start is not None:
        config.model.lora.start = _found_from("model.lora.start", config.model.lora.start, file)
    for key in ("train", "heldout"):
        given = getattr(config.data, key)
        if isinstance(given, HubDataset):
            given.dataset = _found_from(f"data.{key}.dataset", given.dataset, file)
        elif given is not None:
            setattr(config.data, key, _found_from(f"data.{key}", given, file))
    if config.logging.name is None:
        config.logging.name = file.stem
    return config


def _read_tables(file: Path) -> dict:
    try:
        data = strict_json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {file} is a folder") from None
    except OSError as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except strict_json.Refused as error:
        raise UserError(f"config file {file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"config file {file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"config file {file}: expected a table of sections, got {type(data).__name__}")
    return data


def parse_config(data: dict) -> Config:
    """A checked Config of nested tables; UserError as in `load_config`."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item) for item in error.errors())) from None


def _apply_overrides(data: dict, overrides: list[str]) -> None:
    seen: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {shortened(override, VALUE)}: expected section.key=value")
        _set(data, name, _value_of(name, text))
        for earlier in seen:
            if earlier == name or earlier.startswith(f"{name}."):
                note(f"--set {earlier} is given before --set {name}={shortened(text, VALUE)}, which replaces it")
        seen.append(name)


def _set(data: dict, name: str, value) -> None:
    *sections, key = name.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {name}: {section} is not a table")
    data[key] = value


def _value_of(name: str, text: str):
    """The JSON value of an override, or the bare text where it is none."""
    try:
        return strict_json.loads(text)
    except json.JSONDecodeError:
        return _bare(name, text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {name}: {error}, in {shortened(text, VALUE)}") from None


def _bare(name: str, text: str) -> str:
    try:
        return strict_json.check_text(text)
    except strict_json.Refused as error:
        raise UserError(f"--set {name}: {error}") from None


def _found_from(key: str, path: str, config_file: Path) -> str:
    """A relative path is looked up from the working directory, then from each folder above the config file."""
    try:
        if Path(path).exists() or Path(path).is_absolute():
            return path
        for folder in config_file.resolve().parents:
            if (folder / path).exists():
                return str(folder / path)
    except (OSError, ValueError) as error:  # too long for a file name, or characters that none can have
        raise UserError(f"{key}: {shown(path)} cannot be a path: {error if isinstance(error, ValueError) else error.strerror}") from None
    return path


_EMPTY = {"string_too_short": "expected a text that is not empty, got ''", "too_short": "expected a list that is not empty, got []"}


def _explain(error: dict) -> str:
    """One line of a pydantic error, in the user's key names."""
    parts = [str(p) for p in error["loc"]]
    name = ".".join(part if part.isprintable() and len(part) < VALUE else shown(part) for part in parts)
    if error["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{name}: unknown key{hint} Allowed here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: required, and missing"
    if error["type"] == "value_error" and not name:
        return str(error["ctx"]["error"])
    if parts[-1:] == ["[key]"]:
        return f"{'.'.join(parts[:-2])}: expected keys that are texts and not empty, got {shown(error['input'])}"
    if error["type"] in _EMPTY:
        return f"{name}: {_EMPTY[error['type']]}"
    return f"{name}: {error['msg'][0].lower() + error['msg'][1:]}, got {shown(error['input'])}"


def _known_keys(parts: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in parts:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
