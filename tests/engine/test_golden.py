"""The comparison of runs with the recorded ones; the runs themselves are for a change of structure:
python tests/engine/golden.py."""

import copy
import json

import golden

RECORDED = json.loads(golden.FILE.read_text())


def test_every_case_is_recorded():
    assert RECORDED["cases"].keys() == golden.CASES.keys()


def test_a_changed_value_and_changed_weights_are_found():
    want = RECORDED["cases"]["guard"]
    got = copy.deepcopy(want)
    assert golden.differences(want, got, exact=True) == []
    got["rows"][2]["reward/mean"] *= 1 + 1e-9
    got["ema"] = "0"
    assert golden.differences(want, got, exact=False) == []
    first, second = golden.differences(want, got, exact=True)
    assert first.startswith("ema") and second.startswith("iteration 2: reward/mean")
    got["rows"][2]["grad_norm"] *= 1.5
    assert "grad_norm" in golden.differences(want, got, exact=False)[0]


def test_names_may_move():
    want = RECORDED["cases"]["gdpo"]
    got = copy.deepcopy(want)
    got["rows"][1]["new/metric"] = 1.0
    del got["rows"][1]["kl"], got["rows"][2]["kl"], got["rows"][3]["kl"], got["rows"][4]["kl"]
    assert golden.differences(want, got, exact=True) == []
    assert golden.names_moved(want, got) == ["- kl", "+ new/metric"]
