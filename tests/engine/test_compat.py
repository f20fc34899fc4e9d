"""The private names of other libraries that the engine uses: the installed versions have them, and
they do what compat.py says."""

import atexit
import importlib
import inspect
import types

import pytest
import torch

from tempflow import compat


def test_exit_handlers_run():
    """Only its presence: running them would end this process's own libraries."""
    assert callable(atexit._run_exitfuncs)


def test_a_storage_has_a_key_of_its_own_and_a_view_has_its():
    one, other = (torch.empty(3, device="meta") for _ in range(2))
    keys = [compat.storage_key(t.untyped_storage()) for t in (one, one[1:], other)]
    assert keys[0] == keys[1] != keys[2]


def test_the_operator_of_an_overload():
    assert compat.operator_of(torch.ops.aten.mm.default) is torch.ops.aten.mm


def test_whether_a_processor_multiplies_bfloat16():
    assert compat.multiplies_bfloat16() in (True, False)


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"]
)
def test_transformers_name_their_blocks(name):
    import diffusers

    kind = getattr(diffusers, name)
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    blocks = {
        cls.__name__
        for cls in vars(importlib.import_module(kind.__module__)).values()
        if isinstance(cls, type)
    }
    assert compat.block_classes(module) and set(compat.block_classes(module)) <= blocks
    module.compile_repeated_blocks = lambda **options: options
    compat.compile_repeated_blocks(module, mode="default")
    assert list(module._repeated_blocks) == compat.block_classes(module)
    assert callable(kind.compile_repeated_blocks)


def test_weights_that_stay_in_float32():
    """Diffusers' in every dtype, transformers' in float16, and those it is strict about in every
    one."""
    import diffusers
    import transformers

    autoencoder, encoder = (
        diffusers.ModelMixin(),
        transformers.T5EncoderModel(transformers.T5Config(num_layers=1, d_model=8, d_ff=8, d_kv=4)),
    )
    autoencoder._keep_in_fp32_modules = ["time_embed"]
    assert compat.kept_in_float32(autoencoder, torch.bfloat16) == {"time_embed"}
    assert compat.kept_in_float32(encoder, torch.float16) == {"wo"} and not compat.kept_in_float32(
        encoder, torch.bfloat16
    )
    encoder._keep_in_fp32_modules_strict = {"shared"}
    assert compat.kept_in_float32(encoder, torch.bfloat16) == {"shared"}


def test_old_names_are_read():
    """As of attention blocks in VAEs that are years old; a module that knows no older names is left
    alone."""
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    new = {name: tensor for name, tensor in vae.state_dict().items() if ".to_q." in name}
    old = {name.replace(".to_q.", ".query."): tensor for name, tensor in new.items()}
    assert new and old.keys().isdisjoint(new)
    compat.rename_old_keys(vae, old)
    assert old.keys() == new.keys()
    compat.rename_old_keys(torch.nn.Linear(1, 1), {})


def test_names_within_pipelines():
    """Packed and unpacked again a latent is the same; ids count rows and columns."""
    import diffusers

    latents = torch.randn(2, 8, 4, 12)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 8, 4, 12)
    pipe = types.SimpleNamespace(
        _unpack_latents=diffusers.FluxPipeline._unpack_latents, vae_scale_factor=4
    )
    assert torch.equal(compat.unpack_latents(pipe, packed, 16, 48), latents)
    assert callable(diffusers.QwenImagePipeline._unpack_latents)
    ids = compat.flux_image_ids(2, 3, torch.device("cpu"), torch.float32)
    assert (
        ids[:, 1:].tolist() == [[row, column] for row in range(2) for column in range(3)]
        and not ids[:, 0].any()
    )


def test_attention_that_can_be_switched(policy):
    assert compat.has_attention_backends(policy.transformer) and not compat.has_attention_backends(
        torch.nn.Linear(1, 1)
    )


def test_what_stage_3_is_spared():
    """DeepSpeed still asks for it by these names; parameters are the same and in the same order,
    external ones last, and a function with a signature of its own computes what it did."""
    from deepspeed.runtime.zero import linear, partition_parameters, partitioned_param_coordinator
    from deepspeed.utils import nvtx

    compat.spare_zero3_its_records()
    partition_parameters.print_rank_0("nobody asked")
    heard = []
    lines = compat._when_asked(lambda line, *_: heard.append(line))
    lines("nobody asked"), lines("somebody asked", force=True)
    assert heard == ["somebody asked"]
    assert nvtx.enable_nvtx is False and "enable_nvtx" in nvtx.instrument_w_nvtx(id).__globals__
    for module, names in (
        (partition_parameters, ("print_rank_0", "debug_param2name_id_shape_device")),
        (partitioned_param_coordinator, ("print_rank_0", "iter_params")),
    ):
        source = inspect.getsource(module)
        assert all(f"{name}(" in source for name in names)
    whole = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    more = torch.nn.Parameter(torch.ones(1))
    whole.ds_external_parameters = lambda: [("more", more)]
    for _ in range(2):
        found = list(partitioned_param_coordinator.iter_params(whole, recurse=True))
        assert [*map(id, found)] == [*map(id, [*whole.parameters(), more])]
    assert [*map(id, partitioned_param_coordinator.iter_params(whole))] == [id(more)]
    compat.keep_signatures(whole)
    x, layer = torch.ones(1, 3, 2), whole[0]
    out = linear.zero3_linear_wrap(x, layer.weight, layer.bias)
    assert torch.allclose(out, layer(x))


def test_names_of_deepspeed():
    """The setting that an engine asks for, also while it is switched on for one load; and the
    function that is put out of action."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    config = types.SimpleNamespace(load_universal_checkpoint=False)
    engine = types.SimpleNamespace(_config=config)
    with compat.reading_universal_checkpoints(engine):
        assert DeepSpeedEngine.load_universal_checkpoint(engine) is True
    assert DeepSpeedEngine.load_universal_checkpoint(engine) is False
    module = importlib.import_module("deepspeed.comm.torch")
    assert "build_shm_op" in module.TorchBackend.__init__.__code__.co_names, (
        "looked up when the backend is made"
    )
    kept = module.build_shm_op
    try:
        compat.leave_all_reduce_to_gloo()
        assert module.build_shm_op() is None
    finally:
        module.build_shm_op = kept
