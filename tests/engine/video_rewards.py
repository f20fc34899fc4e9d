"""Rewards for runs of videos: smooth in the pixels, as those of `engine_rewards`."""

import numpy as np
from engine_rewards import contrast

from tempflow.rewards import Reward, Scores


class Motion(Reward):
    """Mean change of brightness from a video's first frame to its last, in percent; of its left
    half over its right, so that it has a direction."""

    takes_videos = True

    def score(self, images, prompts, metadata):
        assert images.ndim == 5
        return Scores(
            contrast(images[:, -1], prompts, metadata) - contrast(images[:, 0], prompts, metadata),
            [str(images.shape[1:])] * len(images),
        )


def seen(images, prompts, metadata):
    """`contrast`, with what it was given as the detail."""
    assert images.ndim == 4
    return Scores(
        contrast(images, prompts, metadata),
        [f"{image.shape} {np.round(image.mean(), 3)}" for image in images],
    )
