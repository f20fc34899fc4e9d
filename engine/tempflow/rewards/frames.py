"""Image rewards in runs of videos: with `"frames": 4` in its entry, a reward scores four frames of
each video, and the video's score is their mean.

The pool copies and sends only the frames that an entry asks for, to image and video rewards alike.
`FrameMean` wraps an image reward inside the worker, so the reward itself sees images only.
"""

from __future__ import annotations

import numpy as np

from tempflow.media import frame_places, is_video
from tempflow.rewards.base import Reward, Scores, as_scores


class FrameMean(Reward):
    """A video reward: the mean of an image reward over a video's frames. Frames that could not be
    scored are left out; a video without a scored frame is NaN."""

    takes_videos = True

    def __init__(self, reward: Reward):
        self._reward = reward

    def score(self, images, prompts, metadata):
        videos, frames = images.shape[:2]
        each = [n for n in range(videos) for _ in range(frames)]  # the video of each frame
        found = self._reward.score(
            images.reshape(-1, *images.shape[2:]),
            [prompts[n] for n in each],
            [metadata[n] for n in each],
        )
        scores = as_scores(found, len(each))
        values, texts = scores.values.reshape(videos, frames), scores.details
        known = np.isfinite(values)
        # nanmean would warn about a video of which every frame failed
        mean = np.where(known, values, 0).sum(axis=1, dtype=np.float64) / np.maximum(
            known.sum(axis=1), 1
        )
        maps = scores.maps
        if maps is not None:
            # As the mean of the values: without frames that could not be scored.
            each_map = np.where(
                known[..., None, None], maps.reshape(*known.shape, *maps.shape[1:]), 0
            )
            maps = each_map.sum(1) / np.maximum(known.sum(1), 1)[:, None, None]
        told = (
            [_joined(texts[n * frames :][:frames]) for n in range(videos)]
            if texts is not None
            else None
        )
        return Scores(np.where(known.any(axis=1), mean, np.nan), told, maps=maps)


def _joined(texts: list[str]) -> str:
    """The details of a video's frames in their order, equal texts once."""
    return " | ".join(dict.fromkeys(text for text in texts if text))


def chosen_frames(media: np.ndarray, rows: np.ndarray, frames: int | None) -> np.ndarray:
    """Copy the part of a batch that one reward scores.

    Args:
        media: images [n, H, W, 3] or videos [n, F, H, W, 3].
        rows: int [m], places of the images or videos that the reward applies to.
        frames: frames of each video, evenly spaced; None: all of them, or images.

    Returns:
        [m, ...] of `media`. With `frames` always videos, [m, min(frames, F), H, W, 3]: for
        `FrameMean`, an image is a video of one frame.
    """
    if frames is None:
        return media[rows]  # indexing by an array copies
    videos = media if is_video(media) else media[:, None]
    return videos[rows[:, None], frame_places(videos.shape[1], frames)]
