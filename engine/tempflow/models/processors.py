"""Loading what makes a text encoder's inputs of texts and images, with torchvision or without.

transformers' image processors have a variant on PIL, which it chooses by itself where torchvision
is not installed. Its processors of videos have none, and a processor that would hold one cannot be
made then: it is loaded without, as no family here reads videos.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available


def load_part(kind: Any, path: str):
    """A tokenizer, scheduler or processor of a pipeline's folder, as `kind.from_pretrained`."""
    if issubclass(kind, ProcessorMixin) and not is_torchvision_available():
        kind = without_videos(kind)
    return kind.from_pretrained(path)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without its part for videos, under the same name, by which diffusers
    saves it."""

    def get_attributes(cls) -> list[str]:
        return [name for name in super(made, cls).get_attributes() if name != "video_processor"]  # type: ignore[arg-type]  # `made` is the class that is being defined

    made = type(
        kind.__name__,
        (kind,),
        {"__module__": kind.__module__, "get_attributes": classmethod(get_attributes)},
    )
    return made
