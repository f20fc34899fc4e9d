"""When so many images failed that what is left says nothing: one limit for iterations and
evaluations alike."""

from __future__ import annotations

from tempflow.errors import UserError


class TooManyFailed(UserError):
    """More images failed than `reward_pool.max_failed` allows. model_broken: images were not
    finite, so the weights are at fault."""

    def __init__(self, message: str, model_broken: bool):
        super().__init__(message)
        self.model_broken = model_broken


def check_failed(
    what: str, images: int, failed: int, not_finite: int, allowed: float, last_error: str | None
) -> None:
    """TooManyFailed where more than the share `allowed` of the images of `what` has no reward, or
    none has one.

    failed: images without a reward, `not_finite` of them because they hold NaN or infinity.
    last_error: of the reward pool.
    """
    if failed <= allowed * images and failed < images:
        return
    reasons = []
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
        f"{failed} of {images} images of {what} could not be scored, more than"
        f" reward_pool.max_failed ({allowed:g}) allows; " + "; ".join(reasons),
        bool(not_finite),
    )
