"""The one place where a config becomes a model, for training, evaluation, sampling, export,
benchmarks and tests.

`open_model` loads the policy and the embeddings of its prompts; `load_whole` loads the policy alone
with all its components. `Opened` holds the size, guidance scale and steps that the config uses it
with. A training `Session` is an `Opened` with the rest of a run around it. Neither DeepSpeed nor
rewards are imported here, so that an evaluation starts faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Callable

import torch

from tempflow.config import Config
from tempflow.errors import counted
from tempflow.models import Policy, Sampler, check_examples, family_of, load_policy, most_images
from tempflow.models.embeddings import EmbeddingCache, by_identity, store_of, write_missing
from tempflow.models.quantized import check_library
from tempflow.run.environment import choose_device
from tempflow.sampling.steps import Grid
from tempflow.types import Example


@dataclass
class Opened:
    """A config's policy, and how the config samples from it."""

    config: Config
    policy: Policy
    embeddings: EmbeddingCache
    """Those of the run's prompts and negative prompts."""

    @cached_property
    def sampler(self) -> Sampler:
        """The policy at the size and guidance scale of rollouts. The policy must have its denoiser
        by then."""
        return self.policy.at(self.config.rollout.size, self.config.rollout.scale)

    @cached_property
    def grid(self) -> Grid:
        """The grid of rollouts without `rollout.jitter`, and of evaluations with the same number
        of steps."""
        sigmas = self.sampler.sigmas(self.config.rollout.num_steps)
        return Grid(sigmas, self.config.sde().coefficients(sigmas))

    def eval_sampler(self) -> Sampler:
        """The policy at the size and guidance scale of evaluations."""
        return self.policy.at(self.sampler.size, self.config.eval_guidance())

    def eval_steps(self, asked: int | None = None) -> int:
        """The number of ODE steps of an evaluation: `asked`, or else the config's."""
        return asked or self.config.eval.num_steps or self.config.rollout.num_steps


def open_model(
    config: Config,
    examples: list[Example],
    device: torch.device | str | None = None,
    note: Callable[[str], None] = print,
    *,
    denoiser: bool = True,
) -> Opened:
    """Load the policy before training, and the embeddings of examples and of their negative prompts
    (a collective).

    Args:
        config: a checked config.
        examples: every example that will be used.
        device: default: the GPU, if there is one.
        note: called with each line of text that the user should see.
        denoiser: False leaves the denoiser out. Training sets the one that it trains, or one that
            shares its base.

    Raises:
        UserError: as `load_policy`; bitsandbytes is missing for `model.quantize`; on every rank
            alike, the embedding cache cannot be written.
    """
    check_examples(config.model.path, examples)
    check_library(config.model.quantize)
    device, store = device or choose_device(), None
    offload = config.model.offload_text_encoders
    if config.data.embedding_cache is not None:
        store, family = store_of(config, device), family_of(config.model.path)
        opposed = [other for example in examples if (other := family.opposed(example)) is not None]
        # Before the rest is loaded: text encoders and denoiser are never in memory together.
        write_missing(
            store,
            by_identity(family, [*examples, *opposed]),
            lambda: _load(config, device, parts="text", offload_text_encoders=offload),
            note,
        )
    # With a store, all embeddings are on disk by now, and no text encoder is needed any more.
    policy = _load(
        config,
        device,
        parts="picture" if store else "all",
        denoiser=denoiser,
        offload_text_encoders=offload,
        quantize=config.model.quantize,
    )
    # On this object alone: without images a run of the same family need not be ragged.
    policy.ragged = policy.ragged_with(most_images(examples))
    m = config.model
    # Decoding only: families encode condition images whole (`vae.encoding_whole`).
    for wanted, enable in ((m.vae_slicing, "enable_slicing"), (m.vae_tiling, "enable_tiling")):
        if wanted:
            getattr(policy.pipe.vae, enable)()
    _note_unused(policy, examples, max(config.rollout.guidance_scale, config.eval_guidance()), note)
    return Opened(config, policy, EmbeddingCache(policy, store))


def load_whole(config: Config, dtype: str | None = None) -> Policy:
    """Load the policy before training with its text encoders and without quantization, as it is
    exported. `dtype` defaults to the config's. Raises UserError like `load_policy`."""
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
    # Embeddings of a `sized` family are for outputs of this size, also in evaluations.
    policy.size = config.rollout.size
    return policy


def _note_unused(
    policy: Policy, examples: list[Example], guidance_scale: float, note: Callable[[str], None]
) -> None:
    name = type(policy.pipe).__name__
    if guidance_scale > 1 and not policy.takes_guidance:
        note(
            f"warning: guidance_scale {guidance_scale:g} has no effect, because this {name} is"
            " distilled to run without guidance; set it to 1"
        )
    given = sum(example.negative is not None for example in examples)
    if given and policy.default_negative_prompt is None:
        note(
            f"warning: the negative_prompt of {counted(given, 'prompt')} has no effect, because"
            f" {name} is not guided by a second prediction"
        )
    elif given and not policy.guides(guidance_scale):
        note(
            f"warning: the negative_prompt of {counted(given, 'prompt')} has no effect, because"
            f" guidance_scale {guidance_scale:g} turns guidance off"
        )
