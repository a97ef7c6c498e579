from dataclasses import fields, replace

import pytest

from kvtransfer.layout import BlockLayout, mismatch

LAYOUT = BlockLayout("model-a", "float32", 2, 4, 64, 16, 1, 2)


def test_a_layout_survives_the_wire():
    assert BlockLayout.from_proto(LAYOUT.to_proto()) == LAYOUT
    assert mismatch(LAYOUT, LAYOUT) is None


@pytest.mark.parametrize("name", [field.name for field in fields(BlockLayout)])
def test_a_mismatch_names_the_field_and_both_values(name):
    value = getattr(LAYOUT, name)
    other = replace(LAYOUT, **{name: value + ("x" if isinstance(value, str) else 1)})
    assert mismatch(LAYOUT, other) == f"{name} differs: {value} here, {getattr(other, name)} at the peer"


def test_the_field_that_explains_more_than_the_fingerprint_is_named():
    other = replace(LAYOUT, model_fingerprint="model-b", dtype="bfloat16")
    assert mismatch(LAYOUT, other) == "dtype differs: float32 here, bfloat16 at the peer"
