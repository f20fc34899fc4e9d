"""Rewards that read condition images; named by dotted path in the tests."""

import numpy as np

from tempflow.rewards import Reward, Scores, check_conditions, condition_images


class Told(Reward):
    """Mean of all condition images' pixels; what they are as the detail."""

    def check_prompts(self, prompts, metadata):
        check_conditions(prompts, metadata)

    def score(self, images, prompts, metadata):
        given = [condition_images(entry) for entry in metadata]
        values = [
            np.mean([image.mean(dtype=np.float64) for image in own]) if own else np.nan
            for own in given
        ]
        return Scores(np.array(values), [str([image.shape for image in own]) for own in given])


def kept(images, prompts, metadata):
    """Minus the mean difference of an image to its one condition image of the same size."""
    return [
        -np.abs(image.astype(float) - condition_images(entry)[0]).mean()
        for image, entry in zip(images, metadata)
    ]
