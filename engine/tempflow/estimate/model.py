"""A run's model without weights, on the meta device: its bytes, and the cost of its forwards.

There are two of them, as in a run: the policy of rollouts, and the transformer as it is trained,
with adapters. Both are shortened (`measure.shorten`) after their weights are counted. They and
their measurements are cached, because `fitting.propose` estimates many configs of one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable, Iterable

import torch

from tempflow import eight_bit
from tempflow.config import Config, Lora
from tempflow.errors import UserError, brief
from tempflow.estimate import measure
from tempflow.estimate.measure import Meter
from tempflow.models.base import Policy, text_encoders
from tempflow.models.component import Unfilled
from tempflow.models.hub import local_model
from tempflow.models.loading import check_model, check_text_length, family_of, resolve_dtype
from tempflow.models.quantized import quantize_layers
from tempflow.models.sampler import Sampler
from tempflow.models.skeleton import read_index, skeleton_module
from tempflow.sampling.float8 import float8_bytes
from tempflow.training.engine import add_lora
from tempflow.training.leaves import graph_keeps_weights
from tempflow.training.precision import engine_dtype
from tempflow.types import Example, Size


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def tensor_bytes(tensors) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _elements(module: torch.nn.Module) -> int:
    """Of all parameters."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Pass:
    """The cost of a forward of some rows, with or without its backward."""

    bytes: int
    """Most bytes at once, of all rows together."""
    flops: int
    """Floating point operations of one row."""


@dataclass(frozen=True)
class Weights:
    """The weights of the transformer as it is trained."""

    parameters: int
    """Elements of all parameters, and of the weights that are packed."""
    trained: int
    """Elements of the trained parameters."""
    tensors: int
    """Number of trained parameters."""
    bytes: int
    """Bytes of parameters and buffers."""
    loaded: int
    """Bytes before adapters are added and layers quantized, which the host holds while loading."""
    lasting: int
    """Bytes of parameters, without buffers."""
    largest_adapted: int
    """Elements of the largest weight that has an adapter."""
    eight_bit: int
    """Bytes of the state of an 8-bit optimizer that updates each trained parameter by itself."""


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A policy with a shortened transformer, as rollouts use it."""

    policy: Policy
    blocks: measure.Blocks
    sizes: dict[str, int]
    """Bytes of each module before it was shortened, by name; the transformer is "denoiser"."""
    streamed: int
    """Device bytes of text encoders that are offloaded: buffers, and the largest layer."""
    float8: int
    """Bytes of a float8 copy of the denoiser."""


@dataclass(frozen=True, eq=False)
class _Trained:
    """A shortened transformer with adapters, as it is trained."""

    module: torch.nn.Module
    blocks: measure.Blocks
    weights: Weights
    """Counted before it was shortened."""
    dtype: torch.dtype
    """Of its activations."""


class Model:
    """The model of a config.

    Args:
        config: of the run.
        images: condition images of a prompt; None: as many as the model family takes.
    """

    def __init__(self, config: Config, images: int | None = None):
        self.path = local_model(config.model.path)
        check_model(self.path)
        self.size = config.rollout.size
        self.dtype, self.trained_in = (
            resolve_dtype(config.model.dtype, "cuda"),
            engine_dtype(config.deepspeed),
        )
        self._text, self._scale = (
            check_text_length(self.path, config.model.max_sequence_length),
            config.rollout.guidance_scale,
        )
        self._images, self._quantize = images, config.model.quantize
        self._lora, self._checkpointing = (
            _key_of(config.model.lora),
            config.model.gradient_checkpointing,
        )
        zero = config.deepspeed.get("zero_optimization", {})
        self._gathered = graph_keeps_weights(zero, self._checkpointing)

    @property
    def _frozen(self) -> _Frozen:
        return _frozen(self.path, self.dtype, self._text, self._images, self._quantize)

    @property
    def _trained(self) -> _Trained:
        return _trained(self.path, self.trained_in, self._lora, self._quantize)

    @property
    def weights(self) -> Weights:
        return self._trained.weights

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the modules of the rollout, by name."""
        return self._frozen.sizes

    @property
    def vae(self) -> int:
        """Bytes of the VAE."""
        return self.sizes.get("vae", 0)

    def encoders(self, offloaded: bool) -> int:
        """Device bytes of the text encoders; `offloaded`: with their weights in host memory."""
        if offloaded:
            return self._frozen.streamed
        return sum(size for name, size in self.sizes.items() if name not in ("denoiser", "vae"))

    @property
    def embeds_with_vae(self) -> bool:
        """Whether the VAE is needed to embed prompts (condition images)."""
        return "vae" in self._frozen.policy.embeds_with

    @property
    def adapters(self) -> int:
        """Bytes of the adapters of a rollout copy that shares the base."""
        return self.weights.trained * self.trained_in.itemsize

    @property
    def float8(self) -> int:
        """Bytes of the float8 copy that coarse steps run on."""
        return self._frozen.float8

    @property
    def latent(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self._frozen.policy.latent_shape(self.size)

    @property
    def ragged(self) -> bool:
        """Whether embeddings of prompts differ in shape; then the longest are measured."""
        return self._frozen.policy.ragged

    @property
    def takes_images(self) -> bool:
        """Whether prompts may have condition images."""
        return self._frozen.policy.images_taken[1] > 0

    @property
    def embedding(self) -> tuple[int, int]:
        """Bytes of the embeddings of a prompt, and of a negative prompt (0 if the family has
        none)."""
        policy = self._frozen.policy
        # Families with condition images embed them for one size.
        with policy.embedding_for(self.size):
            each = tensor_bytes(policy.embed([Example("")]).values())
        return each, each if policy.default_negative_prompt is not None else 0

    def forward(self, rows: int, scale: float | None = None) -> Pass:
        """Cost of a rollout's forward of `rows` rows; scale: guidance, None: the rollout's."""
        scale = self._scale if scale is None else scale
        return _line(lambda n: _forward(self._frozen, self.size, scale, n), rows)

    def training(self, rows: int) -> Pass:
        """Cost of a forward and backward of `rows` rows in training."""
        return _line(
            lambda n: _training(
                self._frozen,
                self._trained,
                self._checkpointing,
                self._gathered,
                self.size,
                self._scale,
                n,
            ),
            rows,
        )

    def decode(self) -> Pass:
        """Cost of decoding one image or video."""
        return _decode(self._frozen, self.size)


def _line(measured: Callable[[int], Pass], rows: int) -> Pass:
    """Extrapolate a measurement to many rows, from those at two and three rows."""
    # Not from one row: tensors of a single row are often broadcast (expanded) instead of copied, so
    # one row costs less than the slope says.
    if rows <= 3:
        return measured(rows)
    two, three = measured(2), measured(3)
    return Pass(two.bytes + (rows - 2) * (three.bytes - two.bytes), two.flops)


def _key_of(lora: Lora | None) -> str | None:
    """A hashable key for adapters, by which measurements are cached.

    alpha does not change a cost, so runs that differ by it share measurements. With `start` it must
    stay, because it has to agree with the saved adapters.
    """
    return (
        None
        if lora is None
        else (lora if lora.start else lora.model_copy(update={"alpha": 1.0})).model_dump_json()
    )


# The size of a latent is no part of this cache's key: one policy serves all sizes.
@lru_cache(maxsize=8)
def _frozen(
    path: str, dtype: torch.dtype, text: int, images: int | None, quantize: str | None
) -> _Frozen:
    policy = family_of(path).skeleton(path, dtype, text, images)
    # Before anything is counted. Bytes are counted before `shorten`, in the return, removes blocks.
    quantize_layers(policy.denoiser(), quantize, "meta")
    modules, denoisers = policy.pipe.components, policy.denoiser_parts(policy.pipe.config)
    others = {
        name: part
        for name, part in modules.items()
        if isinstance(part, torch.nn.Module) and name not in denoisers
    }
    sizes = {name: module_bytes(part) for name, part in others.items()}
    sizes["denoiser"] = module_bytes(policy.denoiser())
    float8 = float8_bytes(policy.denoiser())
    streamed = _streamed(text_encoders(policy.pipe).values())
    return _Frozen(policy, measure.shorten(policy.denoiser()), sizes, streamed, float8)


def _streamed(encoders: Iterable[torch.nn.Module]) -> int:
    """Device bytes under `offload_text_encoders`: buffers, and the largest module's parameters."""
    # Its own parameters, not those of modules inside it: hooks copy module by module.
    layers = [layer for encoder in encoders for layer in encoder.modules()]
    own = (tensor_bytes(layer.parameters(recurse=False)) for layer in layers)
    return max(own, default=0) + sum(tensor_bytes(layer.buffers(recurse=False)) for layer in layers)


@lru_cache(maxsize=8)
def _trained(path: str, dtype: torch.dtype, lora: str | None, quantize: str | None) -> _Trained:
    family = family_of(path)
    # A transformer of its own, not the frozen one: its dtype may differ, it has adapters, and both
    # are shortened in place.
    parts = (skeleton_module(path, name, dtype) for name in family.denoiser_parts(read_index(path)))
    module = family.join_denoiser(*parts).train().requires_grad_(True)
    loaded, elements = module_bytes(module), _elements(module)
    quantize_layers(module, quantize, "meta")
    packed = elements - _elements(module)  # of weights that are buffers from now on
    if lora is not None:
        try:
            # Adapters of a start are read from disk; on the meta device nothing can be copied.
            with Unfilled():
                add_lora(module, Lora.model_validate_json(lora), family.lora_targets, 0)
        except ValueError as error:
            raise UserError(f"model.lora: {str(error).splitlines()[0]}") from None
    # The names are peft's: it moves an adapted layer's weight to `base_layer`.
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    adapted = max(
        (p.numel() for name, p in module.named_parameters() if name.endswith("base_layer.weight")),
        default=0,
    )
    weights = Weights(
        _elements(module) + packed,
        sum(p.numel() for p in trained),
        len(trained),
        module_bytes(module),
        loaded,
        tensor_bytes(parameters),
        adapted,
        sum(eight_bit.state_bytes(p.numel()) for p in trained),
    )
    return _Trained(module, measure.shorten(module), weights, dtype)


@lru_cache(maxsize=64)
def _forward(frozen: _Frozen, size: Size, scale: float, rows: int) -> Pass:
    sampler = frozen.policy.at(size, scale)
    return _pass(
        sampler,
        rows,
        frozen.policy.dtype,
        lambda *inputs: measure.inference(
            lambda: sampler.velocity(frozen.policy.denoiser(), *inputs), frozen.blocks
        ),
    )


@lru_cache(maxsize=64)
def _training(
    frozen: _Frozen,
    trained: _Trained,
    checkpointing: bool,
    gathered: bool,
    size: Size,
    scale: float,
    rows: int,
) -> Pass:
    sampler = frozen.policy.at(size, scale)
    module: Any = trained.module
    (
        module.enable_gradient_checkpointing
        if checkpointing
        else module.disable_gradient_checkpointing
    )()
    return _pass(
        sampler,
        rows,
        trained.dtype,
        lambda *inputs: measure.training(
            lambda: sampler.velocity(module, *inputs), module, trained.blocks, gathered
        ),
    )


@lru_cache(maxsize=64)
def _decode(frozen: _Frozen, size: Size) -> Pass:
    latent = torch.empty(1, *frozen.policy.latent_shape(size), device="meta")
    meter = measure.inference(lambda: frozen.policy._decode(latent, size))
    return Pass(meter.peak, meter.flops)


def _pass(sampler: Sampler, rows: int, dtype: torch.dtype, run: Callable[..., Meter]) -> Pass:
    """Measure a forward on made-up inputs.

    Args:
        sampler: a policy at a size and guidance scale.
        rows: of the batch.
        dtype: of the activations.
        run: a function of latents, sigmas, conditioning and dtype.

    Raises:
        UserError: the transformer's config does not fit what its pipeline passes to it.
    """
    policy = sampler.policy
    try:
        x, sigma = (
            torch.empty(rows, *sampler.latent_shape, device="meta"),
            torch.empty(rows, device="meta"),
        )
        with policy.embedding_for(sampler.size):
            inputs = x, sigma, policy.encode([Example("")] * rows), dtype
        # Families compute position ids at their first forward and keep them. They must not count as
        # memory of the measured forward, so a forward with an empty transformer comes first.
        sampler.velocity(lambda hidden_states, *_, **__: (hidden_states,), *inputs)
        meter = run(*inputs)
    except UserError:
        raise
    except Exception as error:
        # A shape error deep in a library: this config does not fit its pipeline.
        raise UserError(
            f"model.path: {type(policy).__name__} cannot run this"
            f" {type(policy.denoiser()).__name__}: {brief(error)}"
        ) from error
    return Pass(meter.peak, meter.flops // rows)  # every row takes the same operations
