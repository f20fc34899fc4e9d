"""Z-Image, base and Turbo: one stream of caption and image tokens, captions of any length, and
guidance at every scale above 0.

The transformer pads captions to a multiple of 32 tokens with a learned token that is attended to,
and counts the image's positions from the end of the padded caption. So padding further would change
the result, and captions are not padded to one length here; those with the same multiple share
forwards. The pipeline's `cfg_normalization` and `cfg_truncation` keep their defaults, which have no
effect.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from tempflow.errors import UserError
from tempflow.models.base import Conditioning
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple, resolution_shift
from tempflow.types import Example, Size

PATCH = 2
_patchify = ZImageTransformer2DModel.patchify_and_embed


def _patchify_filled(self, all_image, all_cap_feats, patch_size, f_patch_size):
    """diffusers' own function, which also takes captions as pairs: embeddings [L, D] padded to a
    multiple of 32, and bool [L], True for the padding."""
    # diffusers takes the number of tokens to pad from a caption's shape, so captions of two lengths
    # could not be stacked.
    if not isinstance(all_cap_feats[0], tuple):
        return _patchify(self, all_image, all_cap_feats, patch_size, f_patch_size)
    captions, filled = zip(*all_cap_feats, strict=True)
    *found, _ = _patchify(self, all_image, list(captions), patch_size, f_patch_size)
    return *found, list(filled)


ZImageTransformer2DModel.patchify_and_embed = _patchify_filled


def _up(length: int) -> int:
    """The number of tokens of a caption of this length after padding."""
    return -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF


class ZImagePolicy(GuidedPolicy):
    """Guided velocities of a ZImageTransformer2DModel with the same inputs as in ZImagePipeline:
    v + scale (v - v of the negative prompt)."""

    text_length, longest_text = 512, 512
    ragged = True
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )

    @staticmethod
    def size_multiple(vae_config) -> int:
        return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)

    @classmethod
    def guides(cls, scale: float) -> bool:
        # The pipeline's scale is smaller by 1 than the usual one, see `_combine`.
        return scale > 0

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]  # a new list, since the pipeline changes it
        captions, _ = self.pipe.encode_prompt(
            texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        missing = [_up(len(caption)) - len(caption) for caption in captions]
        return {
            "caption": torch.stack(
                [
                    torch.nn.functional.pad(c, (0, 0, 0, m))
                    for c, m in zip(captions, missing, strict=True)
                ]
            ),
            "filled": torch.stack(
                [
                    torch.arange(len(c) + m, device=c.device) >= len(c)
                    for c, m in zip(captions, missing, strict=True)
                ]
            ),
        }

    def empty_embeddings(self, count: int) -> Conditioning:
        shape = count, _up(self.max_sequence_length)
        caption = torch.empty(
            *shape, self.pipe.transformer.config.cap_feat_dim, dtype=self.dtype, device=self.device
        )
        return {
            "caption": caption,
            "filled": torch.empty(shape, dtype=torch.bool, device=self.device),
        }

    def _tokens(self, size: Size) -> tuple[int, int]:
        multiple = self.size_multiple(self.pipe.vae.config)
        check_multiple(size, multiple)
        rows, columns = size.height // multiple, size.width // multiple
        _, most_rows, most_columns = self.pipe.transformer.config.axes_lens
        if rows > most_rows or columns > most_columns:
            most = f"{most_rows * multiple} x {most_columns * multiple}"
            raise UserError(
                f"rollout.height, rollout.width: {size}; this model makes at most {most} pixels"
            )
        return rows, columns

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        rows, columns = self._tokens(size)
        return self.pipe.transformer.config.in_channels, PATCH * rows, PATCH * columns

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        scheduler, (rows, columns) = self.pipe.scheduler, self._tokens(size)
        given = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        scheduler.set_timesteps(sigmas=given, mu=resolution_shift(scheduler, rows * columns, 1.15))
        return scheduler.sigmas.float().cpu()

    def _join(self, negative, positive):
        # As a list of rows: the transformer pads and masks the shorter captions itself.
        return {name: [*negative[name], *tensor] for name, tensor in positive.items()}

    def _forward(self, denoiser, x, sigma, conditioning, size):
        captions = list(zip(conditioning["caption"], conditioning["filled"], strict=True))
        # The pipeline's own arithmetic: time runs from 0 to 1, and the prediction is the velocity
        # towards the image, the negative of dx/d sigma.
        time = (1000 - sigma * 1000) / 1000
        predicted = denoiser(list(x.unsqueeze(2)), time, captions, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)

    def _combine(self, positive, negative, scale):
        both = positive.float(), negative.float()  # the pipeline combines in fp32, too
        return (both[0] + scale * (both[0] - both[1])).to(positive.dtype)

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        x = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(x, return_dict=False)[0]
