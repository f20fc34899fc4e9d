"""The limit of failed images, beyond which the rest is no longer representative. Iterations and
evaluations share it."""

from __future__ import annotations

from tempflow.errors import UserError, counted


class TooManyFailed(UserError):
    """More images failed than `reward_pool.max_failed` allows."""

    model_broken: bool
    """Whether images were not finite, so that the weights are at fault and should not be saved."""

    def __init__(self, message: str, model_broken: bool):
        super().__init__(message)
        self.model_broken = model_broken


def check_failed(
    what: str, images: int, failed: int, not_finite: int, allowed: float, last_error: str | None
) -> None:
    """Check the number of failed images of an iteration or an evaluation.

    Args:
        what: named in the message.
        images: all images.
        failed: those without a reward.
        not_finite: those of them that hold NaN or infinity.
        allowed: reward_pool.max_failed, a share of the images.
        last_error: what the reward pool reported last, None where nothing was reported.

    Raises:
        TooManyFailed: where more than `allowed` of the images failed, or all of them.
    """
    # All of them: max_failed may be 1, but without any reward there is no gradient and no mean.
    if failed <= allowed * images and failed < images:
        return
    reasons = []  # both may apply, and they need different remedies
    if not_finite:
        reasons.append(
            f"{not_finite} of them hold NaN or infinity: the weights have diverged, or the dtype is"
            " too narrow for them (a lower learning rate, or another model.dtype, may help)"
        )
    if failed > not_finite:
        nothing_said = (
            "the rewards returned NaN for them, or their weighted sum is too large for float32"
        )
        reasons.append(f"last error: {last_error}" if last_error else nothing_said)
    raise TooManyFailed(
        f"{failed} of {counted(images, 'image')} of {what} could not be scored, more than"
        f" reward_pool.max_failed ({allowed:g}) allows; " + "; ".join(reasons),
        bool(not_finite),
    )
