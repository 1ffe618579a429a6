"""Files of coefficients: read as they were written, and refused unless they say all that is needed."""

import json
import math

import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.merging.coefficients import MergeCoefficients, load_coefficients
from upcycled_moe.merging.merge import plan_merge
from upcycled_moe.merging.settings import MergeSettings


THIRDS = [1 / 3, 1 / 3, 1 / 3]
BY_MATRIX = {"gate_proj": THIRDS, "up_proj": [1, 0, 0], "down_proj": [0.1, 0.2, 0.7]}


def _load(tmp_path, content, has_shared_expert=False):
    path = tmp_path / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_coefficients(path, [0, 2], 3, has_shared_expert)


def _given(**changes):
    return {"format": 1, "layers": {"0": THIRDS, "2": BY_MATRIX}} | changes


def test_a_file_reads_back_to_the_bit(tmp_path):
    coefficients = MergeCoefficients(
        {0: dict.fromkeys(BY_MATRIX, tuple(THIRDS)), 2: {name: tuple(map(float, v)) for name, v in BY_MATRIX.items()}},
        {0: 0.1 + 0.2, 2: math.pi / 4},
    )
    coefficients.save(tmp_path / "saved.json")
    assert load_coefficients(tmp_path / "saved.json", [0, 2], 3, True) == coefficients
    written = json.loads((tmp_path / "saved.json").read_text())
    assert written == _given(shared={"0": 0.1 + 0.2, "2": math.pi / 4})


def test_numbers_with_seven_digits_are_near_enough_to_one(tmp_path):
    assert _load(tmp_path, _given(layers={"0": [0.3333333] * 3, "2": THIRDS})).layers[0]["up_proj"] == (0.3333333,) * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "given.json: not valid JSON"),
        ('{"layers": {"0": [1, 0, 0], "0": [0, 1, 0]}}', "not valid JSON ('0' stands in an object twice)"),
        ("[1]", "holds a list instead of coefficients"),
        (_given(format=2), "format is 2; this version reads 1"),
        ({"layers": {}}, "format is None"),
        (_given(layer={}), "unknown key 'layer'; did you mean 'layers'?"),
        ({"format": 1}, "layers: expected an object with an entry for each MoE layer"),
        (_given(layers={"0": THIRDS}), "layers: layer 2 is missing; give one entry for each of 0, 2"),
        (_given(layers={"0": THIRDS, "1": THIRDS, "2": THIRDS}), "'1' is no MoE layer of the model; those are 0, 2"),
        (_given(layers={"0": [0.5, 0.5], "2": THIRDS}), "layer 0: has 2 entries; give a list of 3 numbers"),
        (_given(layers={"0": 1, "2": THIRDS}), "layer 0: is 1; give a list of 3 numbers, one for each expert"),
        (_given(layers={"0": [0.5, 0.5, 0.1], "2": THIRDS}), "layer 0: the coefficients sum to 1.1; scale them"),
        (_given(layers={"0": [0.333333] * 3, "2": THIRDS}), "layer 0: the coefficients sum to 0.999999;"),
        (_given(layers={"0": [math.nan, 1, 0], "2": THIRDS}), "layer 0, expert 0: nan is not a number from 0 to 1"),
        (_given(layers={"0": [-0.5, 1, 0.5], "2": THIRDS}), "layer 0, expert 0: -0.5 is not a number from 0 to 1"),
        (_given(layers={"0": [True, 0, 0], "2": THIRDS}), "layer 0, expert 0: True is not a number"),
        (
            _given(layers={"0": THIRDS, "2": BY_MATRIX | {"up_prj": []}}),
            "layer 2: unknown key 'up_prj'; did you mean 'up_",
        ),
        (_given(layers={"0": THIRDS, "2": {"up_proj": THIRDS}}), "layer 2: gate_proj is missing; give all of"),
        (_given(shared={"0": 0.5, "2": 0.5}), "has weights of a shared expert, and the model has none"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    with pytest.raises(SettingsError) as error:
        _load(tmp_path, content)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "given.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_given(), "shared: expected an object with an entry for each MoE layer"),
        (_given(shared={"0": 0.5}), "shared: layer 2 is missing"),
        (_given(shared={"0": 0.5, "2": math.inf}), "shared of layer 2: inf is not a number from 0 to 1"),
    ],
)
def test_a_shared_expert_needs_its_weights(tmp_path, content, message):
    with pytest.raises(SettingsError) as error:
        _load(tmp_path, content, has_shared_expert=True)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_coefficients(tmp_path / "none.json", [0], 2, False)


def test_every_slice_needs_an_expert(upcycled, tmp_path):
    _, source = upcycled("qwen2", experts="split")
    MergeCoefficients.alike(dict.fromkeys(range(3), (0.5, 0.5, 0.0, 0.0))).save(tmp_path / "half.json")
    settings = MergeSettings("coefficients", coefficients=tmp_path / "half.json")
    with pytest.raises(SettingsError, match="layer 0, gate_proj: experts 2 to 3 are all copies of one slice"):
        plan_merge(source, settings, tmp_path / "out", 10**9)
