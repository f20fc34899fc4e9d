"""Videos go where images go: decoding, rewards, evaluation, sample files; and image families refuse them."""

import json

import numpy as np
import pytest
import torch
from engine_cases import examples, small_config
from PIL import Image
from stub_policies import CELL, VideoPolicy

from tempflow.errors import UserError
from tempflow.media import STRIP, no_image, plain, some_frames, still
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.opened import Opened
from tempflow.rewards import Reward, RewardPool, parse_rewards, probe
from tempflow.run import evaluation
from tempflow.run.diversity import mean_distance, thumbnails
from tempflow.types import Size

SIZE = Size(16, 24, frames=5)


class LastFrame(Reward):
    """Brightness of a video's last frame."""

    takes_videos = True

    def score(self, images, prompts, metadata):
        assert images.ndim == 5
        return images[:, -1].mean(axis=(1, 2, 3))


def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3))


def videos(count, frames=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, frames, 16, 24, 3), np.uint8)


def test_a_sampler_decodes_videos():
    """Each frame is its own latent's; a video that is not finite is missing in every frame."""
    sampler = VideoPolicy().at(SIZE, 1.0)
    assert sampler.latent_shape == (3, 5, 2, 3)
    latents = torch.linspace(-1, 1, 2 * 3 * 5 * 2 * 3).reshape(2, *sampler.latent_shape)
    latents[1, 0, 2, 0, 0] = float("nan")
    decoded, finite = sampler.decode(latents)
    assert finite.tolist() == [True, False] and decoded.shape == (2, 5, 16, 24, 3) and decoded.dtype == np.uint8
    wanted = ((latents[0] * 0.5 + 0.5) * 255).round().numpy().transpose(1, 2, 3, 0)
    assert np.array_equal(decoded[0, :, ::CELL, ::CELL], wanted)
    assert (decoded[1] == no_image(16, 24)).all()


def test_an_evaluation_of_videos(tmp_path):
    """Drawn, scored and written: the file is a contact strip, and the score of a prompt is that of its own video."""
    policy, prompts = VideoPolicy(), examples(["a cat", "two dogs", "rain"])
    specs, config = parse_rewards({f"{__name__}:LastFrame": 1.0}), small_config(rollout={"micro_batch": 2, "decode_batch": 1})
    model = Opened(config, policy, EmbeddingCache(policy))
    model.sampler = policy.at(SIZE, 1.0)
    drawn = list(evaluation.draw(model, prompts, [0, 1, 2], num_steps=2))
    with RewardPool(specs, workers=0) as pool:
        probe(pool, specs, [p.text for p in prompts], [p.metadata for p in prompts], SIZE)
        found = evaluation.evaluate(pool, specs, prompts, drawn, keep=2)
    made = np.concatenate([images for _, images, _ in drawn])
    assert np.allclose(found.reward, made[:, -1].mean(axis=(1, 2, 3))) and len(set(found.reward)) == 3
    evaluation.write_samples(tmp_path, found, prompts, {"iteration": 0})
    items = json.loads((tmp_path / "samples.json").read_text())["items"]
    assert len(items) == 2
    for item, video in zip(items, made):
        assert np.array_equal(np.asarray(Image.open(tmp_path / item["file"])), np.concatenate(list(video), axis=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_of_images_is_asked_about_no_video(workers):
    specs = parse_rewards({f"{__name__}:LastFrame": 1.0, f"{__name__}:brightness": 1.0})
    with RewardPool(specs, workers=workers) as pool:
        with pytest.raises(UserError, match=rf"rewards.{__name__}:brightness: scores images, and the model makes videos"):
            pool.submit(videos(2), ["a", "b"], [{}, {}])
        ticket = pool.submit(videos(2), ["a", "b"], [{}, {}], rewards=[f"{__name__}:LastFrame"])
        assert np.allclose(pool.gather([ticket])[0][f"{__name__}:LastFrame"].values, videos(2)[:, -1].mean(axis=(1, 2, 3)))
        with pytest.raises(UserError, match="brightness: scores images"):
            probe(pool, specs, ["a"], [{}], SIZE)


@pytest.mark.parametrize("media", [videos(2)[..., 0], videos(2)[None], videos(2).astype(np.float32), videos(2)[0, 0]])
def test_other_arrays_are_refused(media):
    with RewardPool(parse_rewards({"jpeg": 1.0}), workers=0) as pool, pytest.raises(ValueError, match="images must be uint8"):
        pool.submit(media, ["a"] * len(media), [{}] * len(media))


def test_frames_are_evenly_spaced():
    media = videos(2, frames=21)
    assert np.array_equal(some_frames(media, 5), media[:, [0, 5, 10, 15, 20]])
    assert np.array_equal(some_frames(media[:, 0], 5), media[:, :1]), "an image is one frame"
    assert still(media[0]).shape == (16, STRIP * 24, 3) and np.array_equal(still(media[0, 3]), media[0, 3])
    assert plain(2, SIZE, 7).shape == (2, 5, 16, 24, 3) and plain(2, Size(16, 24), 7).shape == (2, 16, 24, 3)


def test_videos_that_end_differently_are_different():
    """And a video of one frame has the thumbnail of the image."""
    media = videos(2)
    media[1, :-1] = media[0, :-1]
    assert mean_distance(thumbnails(media)) > 0.01 and mean_distance(thumbnails(media[:, :-1])) == 0
    assert np.array_equal(thumbnails(media[:, :1]), thumbnails(media[:, 0]))


def test_a_family_of_images_makes_no_video(policy):
    for call in (policy.latent_shape, lambda size: policy.sigmas(4, size)):
        with pytest.raises(UserError, match="32 x 96 x 5 frames: this model makes images"):
            call(Size(32, 96, frames=5))
