"""The model families that the tests go over, one entry each, and diffusers' own pipelines as their
reference.

A new family is a builder of a tiny pipeline in pipelines_NAME.py and a line in FAMILIES:
test_families.py compares it with its pipeline, test_family_runs.py trains and exports it,
test_gpu_families.py replays its graphs, test_simulated_gpu.py runs its shipped config at real
shapes. What only it has is tested in a file of its own. A model that differs from a family in
little is a line in SIBLINGS, which fewer tests go over.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import transformers
from engine_cases import HELDOUT, examples
from engine_cases import PROMPTS as WORDS
from PIL import Image
from pipelines_flux import flux_pipeline
from pipelines_flux2 import dev_pipeline, klein_pipeline, negative_embeddings, plain_pipeline
from pipelines_flux_control import control_images, flux_control_pipeline, of_the_mode
from pipelines_flux_kontext import kontext_pipeline
from pipelines_qwen_image import qwen_pipeline
from pipelines_qwen_image_21 import qwen_21_pipeline
from pipelines_qwen_image_edit import edit_pipeline
from pipelines_sd3 import sd3_pipeline
from pipelines_wan import FIRST_ORDER, wan_pipeline
from pipelines_z_image import z_image_pipeline

from tempflow.models import Conditioning, index_rows
from tempflow.models.processors import load_part
from tempflow.types import Example, Size

FP32 = 1e-5
PROMPTS = ['the word "ABC"', "something else, and longer"]
NEGATIVES = ["blurred, too many words", ""]
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}


@dataclass(frozen=True)
class Family:
    """How the tests build a tiny pipeline, call diffusers' own, and what they expect of it."""

    build: Callable[..., Path]
    """(folder, **options): saves the pipeline there."""
    pipeline: str
    """Its class in diffusers."""
    config: str
    """A shipped config that starts from it; of a sibling, from its family."""
    schedulers: dict[str, dict]
    """Options of `build` by kind; the first kind is the one of all tests that do not compare
    kinds."""
    guidance: str = "guidance_scale"
    """What the pipeline calls the engine's guidance_scale."""
    scale: float = 3.0
    """Of runs."""
    negative: str | None = None
    """The default negative prompt; None: its guidance is built in, or there is none."""
    text_length: int = 512
    """The default max_sequence_length."""
    combine: Callable = lambda positive, negative, scale: (1 - scale) * negative + scale * positive
    """Two predictions to the guided one, for families with negative prompts."""
    images: Callable[[Size], list[list[Image.Image]]] | None = None
    """Condition images of PROMPTS for outputs of a size; None: it takes none."""
    given: Callable[[list[list[Image.Image]]], dict] = lambda images: {
        "image": [one for (one,) in images]
    }
    """The pipeline's arguments for them."""
    during: Callable[[], AbstractContextManager] = nullcontext
    """Context of the pipeline's call, where it needs one to be compared."""
    negatives: Callable = lambda pipe, texts, call: {"negative_prompt": texts}
    """The pipeline's arguments for negative prompts."""
    frames: int = 1
    """Of its videos."""
    alone: bool = False
    """Whether the pipeline is called with one prompt at a time."""
    template: int = 0
    """Tokens that its text must have, for those of its template."""
    cuts: bool = True
    """Whether it cuts prompts to max_sequence_length tokens."""
    sizes: tuple[tuple[int, int], ...] = ((32, 96), (48, 48))
    """Heights and widths at which it is compared with the pipeline."""
    changes: tuple[str, ...] = ()
    """Of a sibling: what makes its family's config one that starts from it."""
    models: str = ""
    """Those that it stands for, as the table of docs/models.md names them."""

    @property
    def cases(self) -> list[tuple[float, list[str] | None]]:
        """Guidance scales and negative prompts that make a difference."""
        if self.negative is None:
            return [(0.0, None), (self.scale, None)]
        return [(0.0, None), (1.0, NEGATIVES), (self.scale, None), (self.scale, NEGATIVES)]

    def plain(self, folder: Path):
        """Diffusers' own pipeline of a folder, its processor as transformers can make it without
        torchvision."""
        import diffusers

        index, parts = json.loads((folder / "model_index.json").read_text()), {}
        if index.get("processor"):
            parts["processor"] = load_part(
                getattr(transformers, index["processor"][1]), str(folder / "processor")
            )
        pipe = getattr(diffusers, self.pipeline).from_pretrained(folder, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def text(self, tokens: int) -> int:
        """A length of its text, if it can be so short."""
        return max(tokens, self.template)

    def length(self, tokens: int) -> dict:
        """The pipeline's argument for the length of its text."""
        return {"max_sequence_length": self.text(tokens)} if self.cuts else {}

    def size(self, height: int, width: int) -> Size:
        return Size(height, width, self.frames)

    def examples(self, texts=PROMPTS, negatives=None, size: Size | None = None) -> list[Example]:
        """Prompts as the engine has them, with the condition images of PROMPTS in turn."""
        if self.images is None:
            return examples(texts, negatives)
        images = self.images(size or self.size(32, 32))
        arrays = [
            tuple(np.asarray(image) for image in images[i % len(images)]) for i in range(len(texts))
        ]
        return [
            Example(text, negative, one)
            for text, negative, one in zip(
                texts, negatives or [None] * len(texts), arrays, strict=True
            )
        ]

    def encoded(
        self, policy, places=(0, 1), size: Size | None = None, texts=PROMPTS, negatives=None
    ) -> Conditioning:
        """The conditioning of rows by prompt; where prompts differ in shape all rows have the first
        one's."""
        size = size or self.size(32, 32)
        examples = self.examples(texts, negatives, size)
        with policy.embedding_for(size):
            if policy.ragged:
                return index_rows(policy.encode(examples[:1]), [0] * len(places))
            return index_rows(policy.encode(examples), list(places))

    def sampled(
        self,
        policy,
        latents,
        size: Size,
        steps: int,
        scale: float,
        negatives=None,
        decode=False,
        **more,
    ):
        """PROMPTS by the engine: final latents, or images."""
        call = {
            "height": size.height,
            "width": size.width,
            "num_steps": steps,
            "guidance_scale": scale,
            "decode": decode,
            **more,
        }
        if self.images:
            call.setdefault("images", self.images(size))
        if self.frames > 1:
            call["frames"] = self.frames
        return policy.sample(PROMPTS, latents=latents, negative_prompts=negatives, **call)

    def reference(
        self,
        pipe,
        latents,
        size: Size,
        steps: int,
        scale: float,
        negatives=None,
        decode=False,
        **more,
    ):
        """PROMPTS by diffusers: the pipeline's own default where there are no negative prompts."""
        call = {
            "height": size.height,
            "width": size.width,
            "num_inference_steps": steps,
            self.guidance: scale,
            **more,
        }
        call |= {"num_frames": self.frames} if self.frames > 1 else {}
        call |= {} if decode else {"output_type": "latent"}
        images, width, found = (
            self.images and self.images(size),
            1 if self.alone else len(PROMPTS),
            [],
        )
        for i in range(0, len(PROMPTS), width):
            rows = slice(i, i + width)
            more = self.negatives(pipe, list(negatives[rows]), call) if negatives else {}
            more |= self.given(images[rows]) if images else {}
            with self.during():
                out = pipe(prompt=PROMPTS[rows], latents=latents[rows].clone(), **more, **call)
            found += [*(out.images if self.frames == 1 else out.frames)]
        return found if decode else torch.stack(found)

    @property
    def rewards(self) -> dict:
        """The entry of a reward that costs nothing."""
        return {
            "engine_rewards:contrast": 1.0 if self.frames == 1 else {"weight": 1.0, "frames": 2}
        }

    def prompt_files(self, folder: Path, size: Size) -> dict[str, str]:
        """data.train and data.heldout; of a family with condition images, with two different sets
        of them in turn, one of which may be empty."""
        if self.images is None:
            return {"train": str(WORDS), "heldout": str(HELDOUT)}
        folder.mkdir(parents=True, exist_ok=True)
        named = [
            [f"{i}-{j}.png" for j in range(len(images))]
            for i, images in enumerate(self.images(size))
        ]
        for names, images in zip(named, self.images(size), strict=True):
            for name, image in zip(names, images, strict=True):
                image.save(folder / name)
        for file, words in (("train", WORDS), ("heldout", HELDOUT)):
            texts = words.read_text().splitlines()[:32]
            lines = []
            for i, text in enumerate(texts):
                names = named[i % len(named)]
                lines.append({"prompt": text, **({"images": names} if names else {})})
            (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return {file: str(folder / f"{file}.jsonl") for file in ("train", "heldout")}


class Kontext(Family):
    """Its pipeline makes a megapixel of any output unless told otherwise."""

    def reference(self, pipe, latents, size, *call, **more):
        return super().reference(
            pipe, latents, size, *call, max_area=size.height * size.width, **more
        )


def rescaled(positive, negative, scale):
    """Guided, and as long as the positive prediction, token by token."""
    guided = (1 - scale) * negative + scale * positive
    return (
        guided
        * (positive.square().sum(-1, keepdim=True) / guided.square().sum(-1, keepdim=True)).sqrt()
    )


FAMILIES = {
    "flux": Family(
        flux_pipeline,
        "FluxPipeline",
        "flux_lora",
        {"dynamic": {"guidance_embeds": True, **DYNAMIC}, "plain": {}, "shifted": {"shift": 3.0}},
        models="FLUX.1 [dev], [schnell]",
    ),
    "flux_control": Family(
        flux_control_pipeline,
        "FluxControlPipeline",
        "flux_control_lora",
        {"dynamic": {"guidance_embeds": True, **DYNAMIC}},
        images=control_images,
        given=lambda images: {"control_image": [one for (one,) in images]},
        during=of_the_mode,
        models="FLUX.1 Depth, Canny",
    ),
    "flux_kontext": Kontext(
        kontext_pipeline,
        "FluxKontextPipeline",
        "kontext_lora",
        {"dynamic": DYNAMIC},
        images=lambda size: [[drawn(90, 160, 0)], [drawn(150, 64, 1)]],
        alone=True,
        models="FLUX.1 Kontext",
    ),
    "sd3": Family(
        sd3_pipeline,
        "StableDiffusion3Pipeline",
        "sd35_lora",
        {"shifted": {"shift": 3.0}, "dynamic": DYNAMIC},
        negative="",
        text_length=256,
        models="Stable Diffusion 3, 3.5",
    ),
    "qwen_image": Family(
        qwen_pipeline,
        "QwenImagePipeline",
        "qwen_image_lora",
        {
            "dynamic": {
                **DYNAMIC,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
            "plain": {},
        },
        guidance="true_cfg_scale",
        negative=" ",
        combine=rescaled,
        models="Qwen-Image",
    ),
    "qwen_image_21": Family(
        qwen_21_pipeline,
        "QwenImage21Pipeline",
        "qwen_image_21_lora",
        {
            "dynamic": {
                **DYNAMIC,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            }
        },
        guidance="true_cfg_scale",
        negative=" ",
        alone=True,
        cuts=False,
        sizes=((32, 96), (64, 64)),
        models="Qwen-Image 2.1",
    ),
    "z_image": Family(
        z_image_pipeline,
        "ZImagePipeline",
        "z_image_lora",
        {"shifted": {"shift": 3.0}, "dynamic": DYNAMIC},
        negative="",
        combine=lambda positive, negative, scale: positive + scale * (positive - negative),
        models="Z-Image, Z-Image-Turbo",
    ),
    "wan": Family(
        wan_pipeline,
        "WanPipeline",
        "wan21_1b_lora",
        {"unipc": {"by_unipc": FIRST_ORDER}, "shifted": {"shift": 3.0}},
        negative="",
        frames=5,
        models="Wan 2.1, 2.2 (text to video)",
    ),
    "flux2": Family(
        klein_pipeline,
        "Flux2KleinPipeline",
        "flux2_klein_lora",
        {"dynamic": DYNAMIC},
        negative="",
        negatives=negative_embeddings,
        models="FLUX.2 [klein] base",
    ),
}
FAMILIES["qwen_image_edit"] = replace(
    FAMILIES["qwen_image"],
    build=partial(edit_pipeline, plus=True),
    pipeline="QwenImageEditPlusPipeline",
    config="qwen_image_edit_lora",
    schedulers={"dynamic": FAMILIES["qwen_image"].schedulers["dynamic"]},
    images=lambda size: [[drawn(90, 160, 0)], [drawn(150, 64, 1), drawn(90, 160, 0)]],
    given=lambda images: {"image": images[0]},
    alone=True,
    models="Qwen-Image-Edit 2509, 2511",
)


class Flux2Dev(Family):
    """Its processor is loaded by hand: plain diffusers wants torchvision for it."""

    def plain(self, folder: Path):
        return plain_pipeline(folder)


# Models that differ from a family above in their embeddings or their guidance alone. They are
# trained, exported, replayed and simulated; the rest of what the tests go over is the family's.
SIBLINGS = {
    "flux2_dev": Flux2Dev(
        dev_pipeline,
        "Flux2Pipeline",
        FAMILIES["flux2"].config,
        {"dynamic": DYNAMIC},
        images=lambda size: [[], [drawn(66, 102, 0), drawn(81, 64, 1)]],
        given=lambda images: {"image": images[0]} if images[0] else {},
        alone=True,
        template=80,
        changes=("model.path=black-forest-labs/FLUX.2-dev",),
        models="FLUX.2 [dev]",
    ),
    "flux2_distilled": replace(
        FAMILIES["flux2"],
        build=partial(klein_pipeline, is_distilled=True),
        changes=("model.path=black-forest-labs/FLUX.2-klein-4B", "rollout.guidance_scale=1"),
        scale=1.0,
        negative=None,
        models="FLUX.2 [klein]",
    ),
    "qwen_image_edit_one": replace(
        FAMILIES["qwen_image_edit"],
        build=edit_pipeline,
        pipeline="QwenImageEditPipeline",
        changes=("model.path=Qwen/Qwen-Image-Edit",),
        images=lambda size: [[drawn(90, 160, 0)], [drawn(150, 64, 1)]],
        given=lambda images: {"image": images[0][0]},
        models="Qwen-Image-Edit",
    ),
}
GUIDED = [name for name, family in FAMILIES.items() if family.negative is not None]


def pipeline_folders(root: Path) -> Callable[..., Path]:
    """Folder of a tiny pipeline by (family, kind), built in `root` when first asked for."""
    made = {}

    def get(name, kind=None):
        family = FAMILIES.get(name) or SIBLINGS[name]
        kind = kind or next(iter(family.schedulers))
        if (name, kind) not in made:
            made[name, kind] = family.build(root / f"{name}-{kind}", **family.schedulers[kind])
        return made[name, kind]

    return get


def drawn(height: int, width: int, seed: int) -> Image.Image:
    """A condition image with something in it, of any size."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.BICUBIC
    )


def latents_for(policy, size: Size, count=2):
    return torch.randn(
        count, *policy.latent_shape(size), generator=torch.Generator().manual_seed(0)
    )
