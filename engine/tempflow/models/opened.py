"""The one place where a config becomes a model: for training, evaluating, sampling, exporting,
benchmarks and tests.

`open_model` loads the policy with the embeddings of its prompts, `load_whole` the policy alone with
all its parts; `Opened` says at which size, guidance and steps the config uses it. A training
`Session` is an `Opened` with the rest of a run around it. Neither DeepSpeed nor a reward is needed
here, so an evaluation does not wait for what training alone uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable

import torch

from tempflow.config import Config
from tempflow.models import Policy, Sampler, check_examples, family_of, load_policy, most_images
from tempflow.models.embeddings import EmbeddingCache, by_identity, store_of, write_missing
from tempflow.run.environment import choose_device
from tempflow.sampling.steps import Grid
from tempflow.types import Example


@dataclass
class Opened:
    """A config's policy, and how the config samples it."""

    config: Config
    policy: Policy
    embeddings: EmbeddingCache

    @cached_property
    def sampler(self) -> Sampler:
        """The policy at the size and guidance scale of rollouts; it must have its denoiser."""
        return self.policy.at(self.config.rollout.size, self.config.rollout.scale)

    @cached_property
    def grid(self) -> Grid:
        """The steps of rollouts without `rollout.jitter`, and of evaluations with as many."""
        sigmas = self.sampler.sigmas(self.config.rollout.num_steps)
        return Grid(sigmas, self.config.sde().coefficients(sigmas))

    def eval_sampler(self) -> Sampler:
        """The policy at the size and guidance scale of evaluations."""
        return self.policy.at(self.sampler.size, self.config.eval_guidance())

    def eval_steps(self, asked: int | None = None) -> int:
        """ODE steps of an evaluation, where `asked` does not say otherwise."""
        return asked or self.config.eval.num_steps or self.config.rollout.num_steps


def open_model(
    config: Config,
    examples: list[Example],
    device: torch.device | str | None = None,
    note: Callable[[str], None] = print,
    *,
    denoiser: bool = True,
) -> Opened:
    """The policy before training and the embeddings of `examples` and of what they are guided away
    from (a collective).

    Args:
        config: checked.
        examples: that will be asked for.
        device: None: the GPU where there is one.
        note: is told of what a user should know.
        denoiser: False leaves it out: training sets the one that it trains, or one that shares the
            base with it.

    Raises UserError as `load_policy` does, and on every rank alike where the cache cannot be
    written.
    """
    check_examples(config.model.path, examples)
    device, store = device or choose_device(), None
    offload = config.model.offload_text_encoders
    if config.data.embedding_cache is not None:
        store, family = store_of(config, device), family_of(config.model.path)
        opposed = [other for example in examples if (other := family.opposed(example)) is not None]
        write_missing(
            store,
            by_identity(family, [*examples, *opposed]),
            lambda: _load(config, device, parts="text", offload_text_encoders=offload),
            note,
        )
    policy = _load(
        config,
        device,
        parts="picture" if store else "all",
        denoiser=denoiser,
        offload_text_encoders=offload,
        quantize=config.model.quantize,
    )
    policy.ragged = policy.ragged_with(most_images(examples))
    m = config.model
    for wanted, enable in ((m.vae_slicing, "enable_slicing"), (m.vae_tiling, "enable_tiling")):
        if wanted:
            getattr(policy.pipe.vae, enable)()
    _note_unused(policy, examples, max(config.rollout.guidance_scale, config.eval_guidance()), note)
    return Opened(config, policy, EmbeddingCache(policy, store))


def load_whole(config: Config, dtype: str | None = None) -> Policy:
    """The policy before training with its text encoders and no weight quantized, as it is exported;
    dtype: None: the config's. UserError as `load_policy`."""
    return _load(config, choose_device(), dtype=dtype)


def _load(
    config: Config, device: torch.device | str, *, dtype: str | None = None, **chosen
) -> Policy:
    m = config.model
    policy = load_policy(
        m.path,
        dtype=dtype or m.dtype,
        device=device,
        max_sequence_length=m.max_sequence_length,
        **chosen,
    )
    policy.size = config.rollout.size
    return policy


def _note_unused(
    policy: Policy, examples: list[Example], guidance_scale: float, note: Callable[[str], None]
) -> None:
    name = type(policy.pipe).__name__
    if guidance_scale > 1 and not policy.takes_guidance:
        note(
            f"warning: guidance_scale {guidance_scale:g} has no effect: this {name} is distilled"
            " and not guided; set it to 1"
        )
    given = sum(example.negative is not None for example in examples)
    if given and policy.default_negative_prompt is None:
        note(
            f"warning: {given} prompts bring a negative_prompt without effect: {name} has its"
            " guidance built in"
        )
    elif given and not policy.guides(guidance_scale):
        note(
            f"warning: {given} prompts bring a negative_prompt without effect: guidance_scale"
            f" {guidance_scale:g} is no guidance"
        )
