"""The two transformers of Wan 2.2 as one module, so that engine, rollout copy and checkpoints each
handle a single module.

A forward splits its rows between the experts. In training, and under ZeRO stage 3, both experts run
in every forward; an expert without rows runs on a single token whose prediction is dropped. Ranks
must run the same collectives in the same order, whatever rows they have, and under ZeRO-3 a
gradient that is not computed again would be that of an earlier step.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin


class Experts(ModelMixin, PeftAdapterMixin):
    """Two WanTransformer3DModel, as submodules with the names of their folders.

    Args:
        high: predicts at high noise levels.
        low: predicts at low noise levels.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, high: torch.nn.Module, low: torch.nn.Module):
        super().__init__()
        self.transformer, self.transformer_2 = high, low
        # Class attributes of diffusers' models: the blocks, for compiling and ZeRO-3, and the
        # weights that casts keep in fp32. Both experts have the same.
        for name in ("_no_split_modules", "_repeated_blocks", "_keep_in_fp32_modules"):
            setattr(self, name, getattr(high, name))

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, low, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """Predict each row by its expert.

        Args:
            hidden_states: [n, C, F, H, W].
            timestep: fp32 [n].
            encoder_hidden_states: [n, tokens, D].
            low: whether each row belongs to the expert for low noise: bool [n], which the host has
                to read; one bool for all rows; or a list of n bools, or of n / 2 where the second
                half of the rows repeats the noise levels of the first.
            return_dict: ignored; callers of diffusers' models pass it.

        Returns:
            A tuple with the predictions, [n, C, F, H, W].
        """
        inputs = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
        }
        # Consecutive rows of one expert. Slices by known lengths, since an index by a mask would
        # make the host wait once more to learn the number of rows.
        runs = [(which, len(list(run))) for which, run in groupby(_read(low, len(hidden_states)))]
        lengths = [length for _, length in runs]
        split = {name: tensor.split(lengths) for name, tensor in inputs.items()}
        pieces = list(hidden_states.split(lengths))
        for which, expert in ((False, self.transformer), (True, self.transformer_2)):
            mine = [n for n, (other, _) in enumerate(runs) if other is which]
            if mine:
                out = expert(
                    **{name: _joined([parts[n] for n in mine]) for name, parts in split.items()},
                    return_dict=False,
                )[0]
                for n, piece in zip(mine, out.split([lengths[n] for n in mine]), strict=True):
                    pieces[n] = piece
            elif self._runs_both():
                # Without rows, but part of the result, so that the backward reaches its weights.
                pieces.append(self._nothing_of(expert, inputs))
        return (_joined(pieces),)

    def _runs_both(self) -> bool:
        """Whether an expert without rows must run, too."""
        # ZeRO-3 sets `ds_id` on weights that it partitions; any forward gathers them.
        return (
            self.training and torch.is_grad_enabled() or hasattr(next(self.parameters()), "ds_id")
        )

    @staticmethod
    def _nothing_of(expert: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """An expert's prediction of one token, cut to no rows: [0, C, F, H, W]. Its weights get
        gradients of 0."""
        x, timestep, text = inputs.values()
        frames, rows, columns = expert.config.patch_size
        out = expert(
            hidden_states=x[:1, :, :frames, :rows, :columns],
            timestep=timestep[:1],
            encoder_hidden_states=text[:1, :1],
            return_dict=False,
        )[0]
        return out[:0].reshape(0, *x.shape[1:])


def _read(low: torch.Tensor | bool | list[bool], rows: int) -> list[bool]:
    """`low` as a list of bools for the rows."""
    if not isinstance(low, torch.Tensor):
        each = [low] if isinstance(low, bool) else low
        return each * (rows // len(each))
    # The meta device has no values. Either expert will do there, since both cost the same.
    return [False] * rows if low.is_meta else low.tolist()


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    # `cat` copies even a single tensor.
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
