"""Loads the tokenizers and processors that prepare a text encoder's inputs, with torchvision or
without it.

transformers' image processors have a variant on PIL, which it selects itself if torchvision is not
installed. Its video processors have none, and a processor that contains one cannot be loaded then.
No family here reads videos, so such a processor is loaded without its video part.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available


def load_part(kind: Any, path: str):
    """Load a tokenizer, scheduler or processor from its folder, like `kind.from_pretrained`."""
    if issubclass(kind, ProcessorMixin) and not is_torchvision_available():
        kind = without_videos(kind)
    return kind.from_pretrained(path)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass of a processor class without its video part."""

    # transformers finds the parts of a processor by this class method.
    def get_attributes(cls) -> list[str]:
        # `made` is the class below, whose method this becomes.
        found = super(made, cls).get_attributes()  # type: ignore[arg-type]
        return [name for name in found if name != "video_processor"]

    # The same name and module, because diffusers writes them into model_index.json.
    made = type(
        kind.__name__,
        (kind,),
        {"__module__": kind.__module__, "get_attributes": classmethod(get_attributes)},
    )
    return made
