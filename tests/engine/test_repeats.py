"""Operations on the meta device that are run once: their second results are what running them again
gives."""

import pytest
import torch

from tempflow.estimate.repeats import Repeats

ATEN = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def listed(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def facts(tensors):
    return [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


OWN = {
    "mul": (ATEN.mul.Tensor, lambda: (meta(63, 1), meta(1, 5).bfloat16())),
    "scalar": (ATEN.mul.Tensor, lambda: (meta(3, dtype=torch.int64), 2.5)),
    "transposed": (ATEN.clone.default, lambda: (meta(7, 9).t(),)),
    "to": (ATEN._to_copy.default, lambda: (meta(7, 9),)),
    "norm": (ATEN.native_layer_norm.default, lambda: (meta(2, 8), [8], meta(8), meta(8), 1e-5)),
    "cat": (ATEN.cat.default, lambda: ([meta(2, 8), meta(3, 8)],)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_result_comes_again(name):
    operation, arguments = OWN[name]
    kwargs = {"dtype": torch.bfloat16} if name == "to" else {}
    run = Repeats()
    run(operation, arguments(), kwargs)
    assert len(run._known) == 1
    again, fresh = run(operation, arguments(), kwargs)
    plain = operation(*arguments(), **kwargs)
    assert type(again) is type(plain)
    assert facts(listed(again)) == facts(listed(plain)) == facts(fresh)
    assert len({t.untyped_storage()._cdata for t in fresh}) == len(fresh)


def test_a_number_of_another_type_is_another_argument():
    run = Repeats()
    assert run(ATEN.mul.Tensor, (meta(3, dtype=torch.int64), 1), {})[0].dtype == torch.int64
    assert run(ATEN.mul.Tensor, (meta(3, dtype=torch.int64), 1.0), {})[0].dtype == torch.float32


SHARED = [
    (ATEN.view.default, ([2],)),
    (ATEN._unsafe_view.default, ([2],)),
    (ATEN.add_.Tensor, (1.0,)),
    (ATEN.split.Tensor, (1,)),
]


@pytest.mark.parametrize("operation, more", SHARED)
def test_what_shares_storage_is_run_every_time(operation, more):
    """Views share it, also those whose signature does not say so."""
    run, tensor = Repeats(), meta(2)
    for _ in range(2):
        out, fresh = run(operation, (tensor, *more), {})
        first = out if isinstance(out, torch.Tensor) else out[0]
        assert not fresh and first.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def test_numbers_are_computed_every_time():
    run = Repeats()
    assert [
        run(ATEN.mul.Tensor, (torch.full((3,), value), 2.0), {})[0].tolist() for value in (1.0, 2.0)
    ] == [[2.0] * 3, [4.0] * 3]
