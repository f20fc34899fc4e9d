"""Rewards of images in runs of videos: the entry's `"frames": 4` scores that many frames of each
video, and averages.

The pool sends on only the frames that an entry asks for, to rewards of images and of videos alike.
`FrameMean` is what makes a reward of images one of videos; it works where the reward does, so
workers and reward servers see images as ever.
"""

from __future__ import annotations

import numpy as np

from tempflow.media import frame_places, is_video
from tempflow.rewards.base import Reward, Scores, as_scores


class FrameMean(Reward):
    """The mean of an image reward over a video's frames, those that it could not score left out;
    NaN where it could score none."""

    takes_videos = True

    def __init__(self, reward: Reward):
        self._reward = reward

    def score(self, images, prompts, metadata):
        videos, frames = images.shape[:2]
        each = [n for n in range(videos) for _ in range(frames)]
        found = self._reward.score(
            images.reshape(-1, *images.shape[2:]),
            [prompts[n] for n in each],
            [metadata[n] for n in each],
        )
        scores = as_scores(found, len(each))
        values, texts = scores.values.reshape(videos, frames), scores.details
        known = np.isfinite(values)
        mean = np.where(known, values, 0).sum(axis=1, dtype=np.float64) / np.maximum(
            known.sum(axis=1), 1
        )
        told = (
            [_joined(texts[n * frames :][:frames]) for n in range(videos)]
            if texts is not None
            else None
        )
        return Scores(np.where(known.any(axis=1), mean, np.nan), told)


def _joined(texts: list[str]) -> str:
    """What was told of a video's frames, in their order; once where it is the same of several."""
    return " | ".join(dict.fromkeys(text for text in texts if text))


def chosen_frames(media: np.ndarray, rows: np.ndarray, frames: int | None) -> np.ndarray:
    """A copy of what a reward is asked about, [len(rows), ...]: some of the videos or images, and
    of videos the frames of its entry.

    An entry with `frames` is given videos [n, f, H, W, 3], also of images, which are one frame.
    """
    if frames is None:
        return media[rows]
    videos = media if is_video(media) else media[:, None]
    return videos[rows[:, None], frame_places(videos.shape[1], frames)]
