from dataclasses import fields, replace

import pytest

from kvtransfer.layout import BlockLayout, difference, obstacle

LAYOUT = BlockLayout("model-a", "float32", 2, 4, 64, 16, 1, 2, "weights-a")


BYTES = [field.name for field in fields(BlockLayout) if field.name != "weights_fingerprint"]


def test_a_layout_survives_the_wire():
    assert BlockLayout.from_proto(LAYOUT.to_proto()) == LAYOUT
    assert difference(LAYOUT, LAYOUT) is None
    assert LAYOUT.block_bytes == 2 * 4 * 2 * 16 * 64 * 4
    assert LAYOUT.heads == range(4, 8)


@pytest.mark.parametrize("name", BYTES)
def test_a_difference_names_the_field_and_both_values(name):
    value = getattr(LAYOUT, name)
    other = replace(LAYOUT, **{name: value + ("x" if isinstance(value, str) else 1)})
    says = f"{name} differs: {value} at the puller, {getattr(other, name)} at the offerer"
    assert difference(LAYOUT, other) == says


def test_the_field_that_explains_more_than_the_fingerprint_is_named():
    other = replace(LAYOUT, model_fingerprint="model-b", dtype="bfloat16")
    assert difference(LAYOUT, other) == "dtype differs: float32 at the puller, bfloat16 at the offerer"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 3}, "num_layers differs: 2 at the puller, 3 at the offerer"),
        ({"head_dim": 32}, "head_dim differs"),
        ({"num_kv_heads": 2}, "num_kv_heads differs: 4 at the puller, 2 at the offerer, on 2 and 2 ranks"),
        ({"model_fingerprint": "model-b"}, "model_fingerprint differs"),
        ({"model_fingerprint": "model-b", "page_size_tokens": 32}, "model_fingerprint differs"),
        ({"dtype": "float16", "weights_fingerprint": "weights-b"}, "weights_fingerprint differs"),
        ({"dtype": "int8"}, "dtype int8 of the offerer cannot be converted"),
        ({"page_size_tokens": 0}, "the offerer states an impossible layout"),
        ({"tp_rank": 2}, "the offerer states an impossible layout"),
        ({"tp_size": 0, "tp_rank": 0}, "the offerer states an impossible layout"),
    ],
)
def test_what_no_conversion_helps_against_is_named(changes, says):
    assert says in (obstacle(LAYOUT, replace(LAYOUT, **changes), other_dtypes=True) or "")


def test_another_dtype_is_an_obstacle_unless_allowed_and_always_where_answers_are_to_be_exact():
    other = replace(LAYOUT, dtype="bfloat16", model_fingerprint="model-a in bfloat16")
    assert obstacle(LAYOUT, other, False) == "dtype differs: float32 at the puller, bfloat16 at the offerer"
    assert obstacle(LAYOUT, other, True) is None
    exact = replace(LAYOUT, weights_fingerprint="")
    for puller, offerer in ((exact, other), (other, exact)):
        assert "dtype differs" in (obstacle(puller, offerer, True) or "")


def test_bytes_of_a_dtype_that_cannot_be_told_are_still_copied_as_they_are():
    quantised = replace(LAYOUT, dtype="int8")
    assert obstacle(quantised, quantised, False) is None
    assert "cannot be converted" in (obstacle(quantised, replace(quantised, page_size_tokens=32), False) or "")
