"""Videos go where images go: decoding, rewards, evaluation, sample files; and image families refuse
them."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_cases import examples, small_config
from engine_rewards import contrast
from PIL import Image
from stub_policies import CELL, VideoPolicy

from tempflow.errors import UserError
from tempflow.estimate import estimate, memory
from tempflow.estimate.disk import disk
from tempflow.media import STRIP, condition_image, no_image, plain, some_frames, still
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.opened import Opened
from tempflow.models.sizes import check_multiple
from tempflow.rewards import Reward, RewardPool, parse_rewards, probe
from tempflow.run import collage, evaluation
from tempflow.run.diversity import mean_distance, thumbnails
from tempflow.run.drift import between_folders, look, metrics
from tempflow.run.files import CONDITION, encoded, frames_of_file, strip_of_file
from tempflow.training.start import checked_inputs
from tempflow.types import Size

SIZE = Size(16, 24, frames=5)


class LastFrame(Reward):
    """Brightness of a video's last frame."""

    takes_videos = True

    def score(self, images, prompts, metadata):
        assert images.ndim == 5
        return images[:, -1].mean(axis=(1, 2, 3))


def videos(count, frames=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, frames, 16, 24, 3), np.uint8)


def test_a_sampler_decodes_videos():
    """Each frame is its own latent's; a video that is not finite is missing in every frame."""
    sampler = VideoPolicy().at(SIZE, 1.0)
    assert sampler.latent_shape == (3, 5, 2, 3)
    latents = torch.linspace(-1, 1, 2 * 3 * 5 * 2 * 3).reshape(2, *sampler.latent_shape)
    latents[1, 0, 2, 0, 0] = float("nan")
    decoded, finite = sampler.decode(latents)
    assert (
        finite.tolist() == [True, False]
        and decoded.shape == (2, 5, 16, 24, 3)
        and decoded.dtype == np.uint8
    )
    wanted = ((latents[0] * 0.5 + 0.5) * 255).round().numpy().transpose(1, 2, 3, 0)
    assert np.array_equal(decoded[0, :, ::CELL, ::CELL], wanted)
    assert (decoded[1] == no_image(16, 24)).all()


def test_an_evaluation_of_videos(tmp_path):
    """Drawn, scored and written: the file plays the video, and the score of a prompt is that of its
    own video."""
    policy, prompts = VideoPolicy(), examples(["a cat", "two dogs", "rain"])
    specs, config = (
        parse_rewards({f"{__name__}:LastFrame": 1.0}),
        small_config(rollout={"micro_batch": 2, "decode_batch": 1}),
    )
    model = Opened(config, policy, EmbeddingCache(policy))
    model.sampler = policy.at(SIZE, 1.0)
    drawn = list(evaluation.draw(model, prompts, [0, 1, 2], num_steps=2))
    with RewardPool(specs, workers=0) as pool:
        probe(pool, specs, [p.text for p in prompts], [p.metadata for p in prompts], SIZE)
        found = evaluation.evaluate(pool, specs, prompts, drawn, keep=2)
    made = np.concatenate([images for _, images, _ in drawn])
    assert (
        np.allclose(found.reward, made[:, -1].mean(axis=(1, 2, 3))) and len(set(found.reward)) == 3
    )
    evaluation.write_samples(tmp_path, found, prompts, {"iteration": 0})
    items = json.loads((tmp_path / "samples.json").read_text())["items"]
    assert len(items) == 2
    for item, video in zip(items, made):
        shown = np.stack([np.asarray(frame) for frame in frames_of_file(tmp_path / item["file"])])
        assert (
            item["file"].endswith(".webp")
            and shown.shape == video.shape
            and np.abs(shown.astype(int) - video).mean() < 8
        )


def moving(seed=0, frames=9):
    """A square that goes across: [frames, 32, 48, 3]."""
    video = np.full((frames, 32, 48, 3), 0, np.uint8)
    for n in range(frames):
        video[n, 8:24, 4 * n : 4 * n + 12] = (200, 30 + 30 * seed, 90)
    return video


def test_a_video_is_a_file_that_plays_and_an_image_one_that_does_not(tmp_path):
    """Frames that are equal are shown as long as they were; where nothing moves, a strip stands for
    the video."""
    video = moving()
    video[3:6] = video[3]
    name = encoded(video).write(tmp_path, "0000")
    with Image.open(tmp_path / name) as opened:
        assert (name, opened.n_frames, opened.info["loop"]) == ("0000.webp", 7, 0)
    read = np.stack([np.asarray(frame) for frame in frames_of_file(tmp_path / name)])
    assert read.shape == video.shape and np.abs(read.astype(int) - video).mean() < 3
    name = encoded(video[0]).write(tmp_path, "0001")
    assert name == "0001.png" and np.array_equal(np.asarray(Image.open(tmp_path / name)), video[0])
    strip, frames = strip_of_file(tmp_path / "0000.webp", 24, 4)
    assert (strip.size, frames) == ((4 * 24, 16), 4) and strip_of_file(
        tmp_path / "0001.png", 24, 4
    )[1] == 1
    pair = collage.row([video[0], video])
    assert (
        pair.shape == (9, 32, 100, 3)
        and (pair[:, :, 48:52] == 255).all()
        and np.array_equal(pair[:, :, 52:], video)
    )
    assert all(np.array_equal(frame, video[0]) for frame in pair[:, :, :48])


def test_the_drift_between_folders_of_videos(tmp_path):
    """About that of the videos themselves: their files are lossy."""
    before, now = (np.stack([moving(seed) for seed in seeds]) for seeds in ((0, 2, 5), (3, 5, 6)))
    for folder, some in (("before", before), ("now", now)):
        (tmp_path / folder).mkdir()
        for n, video in enumerate(some):
            encoded(video).write(tmp_path / folder, f"{n:04d}")
        encoded(some[0, 0]).write(tmp_path / folder, f"0000{CONDITION}")
    found = between_folders(tmp_path / "before", tmp_path / "now")
    assert found == pytest.approx(metrics(look(before), look(now)), rel=0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_of_images_is_asked_about_no_video(workers):
    # of a module that a worker process imports in no time, unlike this one
    image, motion = "video_rewards:seen", "video_rewards:Motion"
    specs = parse_rewards({motion: 1.0, image: 1.0})
    with RewardPool(specs, workers=workers) as pool:
        with pytest.raises(
            UserError, match=f"rewards.{image}: scores images, but the model makes videos"
        ):
            pool.submit(videos(2), ["a", "b"], [{}, {}])
        ticket = pool.submit(videos(2), ["a", "b"], [{}, {}], rewards=[motion])
        change = (contrast(videos(2)[:, n], [], []) for n in (-1, 0))
        assert np.allclose(pool.gather([ticket])[0][motion].values, next(change) - next(change))
        with pytest.raises(UserError, match="seen: scores images"):
            probe(pool, specs, ["a"], [{}], SIZE)


@pytest.mark.parametrize(
    "media", [videos(2)[..., 0], videos(2)[None], videos(2).astype(np.float32), videos(2)[0, 0]]
)
def test_other_arrays_are_refused(media):
    with (
        RewardPool(parse_rewards({"jpeg": 1.0}), workers=0) as pool,
        pytest.raises(ValueError, match="images must be uint8"),
    ):
        pool.submit(media, ["a"] * len(media), [{}] * len(media))


def test_frames_are_evenly_spaced():
    media = videos(2, frames=21)
    assert np.array_equal(some_frames(media, 5), media[:, [0, 5, 10, 15, 20]])
    assert np.array_equal(some_frames(media[:, 0], 5), media[:, :1]), "an image is one frame"
    assert still(media[0]).shape == (16, STRIP * 24, 3) and np.array_equal(
        still(media[0, 3]), media[0, 3]
    )
    assert plain(2, SIZE, 7).shape == (2, 5, 16, 24, 3) and plain(2, Size(16, 24), 7).shape == (
        2,
        16,
        24,
        3,
    )


def test_videos_that_end_differently_are_different():
    """And a video of one frame has the thumbnail of the image."""
    media = videos(2)
    media[1, :-1] = media[0, :-1]
    assert mean_distance(thumbnails(media)) > 0.01 and mean_distance(thumbnails(media[:, :-1])) == 0
    assert np.array_equal(thumbnails(media[:, :1]), thumbnails(media[:, 0]))


def test_a_family_of_images_makes_no_video(policy):
    for call in (policy.latent_shape, lambda size: policy.sigmas(4, size)):
        with pytest.raises(
            UserError, match="rollout.frames: 5; this model makes images, so only 1 is allowed"
        ):
            call(Size(32, 96, frames=5))


def gray(level, size=(3, 2), mode="L"):
    return Image.new(mode, size, level)


def test_sample_takes_images_and_frames():
    """An entry for each prompt, for one text its own; the latents are those of the arrays in RGB; a
    video is a list of frames."""
    policy, call = VideoPolicy(), {"height": 16, "width": 24, "num_steps": 2, "guidance_scale": 1.0}
    x = torch.rand(2, 3, 5, 2, 3)
    made = policy.sample(
        ["a", "b"], latents=x, images=[gray(7), [gray(200, (5, 1))]], frames=5, **call
    )
    assert [image.shape for example in policy.embedded[-2:] for image in example.images] == [
        (2, 3, 3),
        (1, 5, 3),
    ]
    assert [[frame.size for frame in video] for video in made] == [[(24, 16)] * 5] * 2
    for images in (gray(7), [gray(7)], [gray((7, 7, 7, 9), mode="RGBA")]):
        policy.sample("a", latents=x[:1], images=images, frames=5, **call)
        (given,) = policy.embedded[-1].images
        assert given.dtype == np.uint8 and given.tolist() == [[[7] * 3] * 3] * 2
    assert policy.sample("a", latents=x[:1, :, :1], **call)[0].size == (
        24,
        16,
    ), "without frames it is an image"
    assert [
        frame.size for frame in policy.sample("a", latents=x[:1, :, :1], frames=1, **call)[0]
    ] == [(24, 16)]


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        (["a", "b"], gray(7), "images: expected a list with an entry for each prompt, got Image"),
        (["a", "b"], [gray(7)], "images: 1 entries for 2 prompts"),
        (
            ["a", "b"],
            [gray(7), "b.png"],
            r"images\[1\]: expected a PIL image or a list of PIL images, got 'b.png'",
        ),
        ("a", [[gray(7)]], "images: expected a PIL image"),
        (
            ["a", "b"],
            [gray(7), [gray(7)] * 2],
            "images: prompt 1: has 2 images; Video takes 0 to 1 image with a prompt",
        ),
    ],
)
def test_sample_names_the_images(prompts, images, message):
    call = {
        "latents": torch.rand(len(prompts), 3, 1, 2, 3),
        "height": 16,
        "width": 24,
        "num_steps": 2,
        "guidance_scale": 1.0,
    }
    with pytest.raises((ValueError, UserError), match=message):
        VideoPolicy().sample(prompts, images=images, **call)


def test_a_family_without_images_takes_none(policy):
    x = torch.rand(1, *policy.latent_shape(Size(16, 16)))
    call = partial(
        policy.sample, "a", latents=x, height=16, width=16, num_steps=1, guidance_scale=0.0
    )
    with pytest.raises(UserError, match="images: prompt 0: has 1 image, but Flux takes text only"):
        call(images=gray(7))
    with pytest.raises(UserError, match="rollout.frames: 5; this model makes images"):
        call(frames=5)
    with pytest.raises(ValueError, match="frames: expected a whole number from 1 on, got 0"):
        call(frames=0)


def test_condition_images_are_read_as_people_see_them(tmp_path):
    """Turned as the camera says, in RGB; an array as it is; a damaged file is named."""
    upright = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8), "RGBA"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    read = condition_image(tmp_path / "turned.png")
    assert read.mode == "RGB" and np.array_equal(
        np.asarray(read), np.rot90(np.asarray(upright)[..., :3], -1)
    )
    assert np.array_equal(np.asarray(condition_image(np.asarray(read))), np.asarray(read))
    (tmp_path / "damaged.png").write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    for name in ("damaged.png", "none.png"):
        with pytest.raises(UserError, match=f"image .*{name}.*: cannot be read as an image"):
            condition_image(tmp_path / name)


@pytest.mark.parametrize(
    "frames, step, refusal",
    [(1, 4, ""), (5, 4, ""), (81, 4, ""), (8, 4, "such as 5 or 9"), (2, 4, "such as 1 or 5")],
)
def test_a_family_says_how_many_frames_it_makes(frames, step, refusal):
    with (
        pytest.raises(UserError, match=f"rollout.frames: {frames}; .* multiple of 4, {refusal}")
        if refusal
        else nullcontext()
    ):
        check_multiple(Size(16, 24, frames), CELL, step)


def test_a_run_of_images_with_frames_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="rollout.frames: 5; this model makes images"):
        checked_inputs(
            small_config(rollout={"frames": 5}, logging={"name": "videos", "dir": str(tmp_path)})
        )
    with pytest.raises(UserError, match="rollout.frames: 5; this model makes images"):
        estimate(small_config(rollout={"frames": 5}))


def test_the_dry_run_counts_the_frames_that_rewards_are_given():
    """Of all rows of an iteration, beside the decoded batch; rewards that get whole videos share
    one copy, watched ones get none."""

    def sent(rewards, workers=1):
        return memory._sent(
            small_config(
                rewards=rewards,
                reward_pool={"workers": workers},
                rollout={"frames": 9, "decode_batch": 2},
            ),
            2,
        )

    frame, rows = 3 * 32 * 96, 2 * (1 + 3 * 2)
    image, motion = "engine_rewards:contrast", f"{__name__}:LastFrame"
    assert sent({image: {"frames": 4}}) == (2 * 9 + rows * 4) * frame
    assert (
        sent({image: {"frames": 4}, motion: 1.0, "also": {"type": motion}})
        == (2 * 9 + rows * (4 + 9)) * frame
    )
    assert sent({image: {"frames": 4}, motion: 0}) == sent({image: {"frames": 4}})
    assert sent({image: {"frames": 4}}, workers=0) == 2 * 9 * frame


@pytest.mark.parametrize("frames, pixel", [(1, 1.5), (9, 0.1)])
def test_the_dry_run_says_what_samples_take(frames, pixel):
    """Of the evaluation before training, those after iterations 2, 4 and 6, and the last one."""
    table = {
        "rollout": {"frames": frames},
        "training": {"iterations": 7},
        "eval": {"every": 2, "prompts": 8, "keep_samples": 3},
    }
    parts = SimpleNamespace(whole_fp32=1, saved_weights=1, saved_optimizer=1)
    assert disk(small_config(**table), parts).samples == int(5 * 3 * 32 * 96 * frames * pixel)
