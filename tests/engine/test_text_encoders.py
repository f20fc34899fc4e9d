"""Text encoders in host memory: the same embeddings to the bit, and only a layer at a time on the
device, which the dry run counts."""

import pytest
import torch
from engine_cases import MODEL, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from tempflow.estimate import estimate
from tempflow.estimate.fitting import changed, options
from tempflow.estimate.model import tensor_bytes
from tempflow.models.base import text_encoders
from tempflow.models.opened import open_model
from tempflow.types import Example

pytestmark = pytest.mark.cpu
PROMPTS = [Example('the word "ABC"')]


def config_for(model, cache=None, **more):
    return small_config(
        model={"path": str(model), "max_sequence_length": 20, **more},
        data={"embedding_cache": cache},
        rollout={"guidance_scale": 3.0},
    )


def open_with(model, **more):
    return open_model(config_for(model, **more), PROMPTS, "cpu", note=lambda text: None)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "flux2", "wan"])
def test_they_embed_the_same(family_folders, name):
    """To the bit; between forwards no weight of theirs is on the device."""
    model = MODEL if name == "flux" else family_folders(name)
    plain, offloaded = open_with(model), open_with(model, offload_text_encoders=True)
    expected, found = (opened.embeddings.get(PROMPTS) for opened in (plain, offloaded))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    encoders = text_encoders(offloaded.policy.pipe)
    assert encoders.keys() == text_encoders(plain.policy.pipe).keys() and encoders
    for part, encoder in encoders.items():
        assert all(p.device.type == "meta" for p in encoder.parameters()), part
    assert offloaded.policy.denoiser().device.type == "cpu"


class Present(TorchDispatchMode):
    """The most bytes of some modules' parameters that are anywhere but on the meta device at an
    operation: with accelerate's hooks, those that an operation needs."""

    def __init__(self, modules):
        super().__init__()
        self.most, self._modules = 0, list(modules)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        parameters = (p for module in self._modules for p in module.parameters())
        self.most = max(self.most, tensor_bytes(p for p in parameters if p.device.type != "meta"))
        return func(*args, **(kwargs or {}))


def test_a_layer_at_a_time_is_there():
    """The largest one, which the dry run counts; without the option all encoders."""
    held = {}
    for offload in (False, True):
        policy = open_with(MODEL, offload_text_encoders=offload).policy
        with Present(text_encoders(policy.pipe).values()) as present:
            policy.embed(PROMPTS)
        config = config_for(MODEL, "cache", offload_text_encoders=offload)
        (counted,) = (i for i in estimate(config).memory.embedding if i.name == "text encoders")
        held[offload] = present.most
        assert present.most == pytest.approx(counted.bytes, rel=0.05), "but for buffers"
    assert held[True] < held[False] / 2


def test_the_dry_run_counts_the_embedding_phase():
    """Before the rest is loaded, with a cache; without one the encoders stay, on the GPU or on the
    host."""

    def memory(cache, offload):
        return estimate(config_for(MODEL, cache, offload_text_encoders=offload)).memory

    sizes = [
        [sum(i.bytes for i in part if i.name.startswith("text encoders")) for part in parts]
        for m in (memory("c", False), memory("c", True), memory(None, False), memory(None, True))
        for parts in [(m.embedding, m.resident, m.host)]
    ]
    whole, layer = sizes[0][0], sizes[1][0]
    assert 0 < layer < whole / 2
    assert sizes == [[whole, 0, 0], [layer, 0, 0], [0, whole, 0], [0, layer, whole]]
    m = memory("c", False)
    assert m.total == max(m.running, m.embeds) and m.embeds == sum(i.bytes for i in m.embedding)


def test_a_proposal_keeps_them_on_the_host():
    config = config_for(MODEL)
    option = next(o for o in options(1) if "text encoders' weights" in o.cost)
    assert option.changes(config, estimate(config)) == {"model.offload_text_encoders": True}
    assert option.changes(changed(config, {"model.offload_text_encoders": True}), None) is None
