"""The two transformers of Wan 2.2 as one module, so that engine, rollout copy and checkpoints know
of one.

A forward splits its rows. In training, and where ZeRO-3 holds weights in slices, both experts run
in every forward, one without rows on a single token that goes nowhere: ranks must run the same
collectives in the same order, whatever rows they have, and under ZeRO-3 a gradient that is not made
anew would be that of an earlier step.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin


class Experts(ModelMixin, PeftAdapterMixin):
    """Two WanTransformer3DModel, named as their folders are.

    high: predicts at high noise levels. low: at low ones.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, high: torch.nn.Module, low: torch.nn.Module):
        super().__init__()
        self.transformer, self.transformer_2 = high, low
        for name in ("_no_split_modules", "_repeated_blocks", "_keep_in_fp32_modules"):
            setattr(self, name, getattr(high, name))

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, low, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """The prediction of each row by its expert.

        hidden_states: [n, C, F, H, W].
        timestep: fp32 [n].
        encoder_hidden_states: [n, tokens, D].
        low: whether each row is for the expert for low noise, bool [n], which the host reads; or
        one bool for all. Returns [n, C, F, H, W] alone in a tuple.
        """
        inputs = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
        }
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
                pieces.append(self._nothing_of(expert, inputs))
        return (_joined(pieces),)

    def _runs_both(self) -> bool:
        # DeepSpeed's, of weights in slices
        return (
            self.training and torch.is_grad_enabled() or hasattr(next(self.parameters()), "ds_id")
        )

    @staticmethod
    def _nothing_of(expert: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """An expert's prediction of one token, of which no row is left, [0, C, F, H, W]."""
        x, timestep, text = inputs.values()
        frames, rows, columns = expert.config.patch_size
        out = expert(
            hidden_states=x[:1, :, :frames, :rows, :columns],
            timestep=timestep[:1],
            encoder_hidden_states=text[:1, :1],
            return_dict=False,
        )[0]
        return out[:0].reshape(0, *x.shape[1:])


def _read(low: torch.Tensor | bool, rows: int) -> list[bool]:
    if isinstance(low, bool):
        return [low] * rows
    # on the meta device either will do: both cost alike
    return [False] * rows if low.is_meta else low.tolist()


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
