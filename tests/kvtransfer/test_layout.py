from dataclasses import fields, replace

import pytest
import torch

from baton.errors import PeerError
from kvtransfer.layout import BlockLayout, difference, heads_in_common, obstacle, ranks_in_common

LAYOUT = BlockLayout("model-a", "float32", 2, 4, 64, 16, 1, 2, "weights-a")
FLOAT8 = replace(LAYOUT, dtype="float8_e4m3fn", kv_scales=tuple(0.1 * number for number in range(1, 17)))

BYTES = [field.name for field in fields(BlockLayout) if field.name not in ("weights_fingerprint", "kv_scales")]


def test_a_layout_survives_the_wire():
    for layout in (LAYOUT, FLOAT8):
        assert BlockLayout.from_proto(layout.to_proto()) == layout
    assert difference(LAYOUT, LAYOUT) is None
    assert LAYOUT.block_bytes == 2 * 4 * 2 * 16 * 64 * 4
    assert FLOAT8.block_bytes == 2 * 4 * 2 * 16 * 64
    assert replace(LAYOUT, dtype="int8").block_bytes == 2 * 4 * 2 * 16 * (64 + 4)
    assert LAYOUT.heads == range(4, 8)
    assert FLOAT8.scales(range(6, 7)).flatten().tolist() == [FLOAT8.kv_scales[index] for index in (4, 5, 12, 13)]


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
        ({"dtype": "int4"}, "dtype int4 of the offerer cannot be converted"),
        ({"kv_scales": (1.0,) * 16}, "the offerer states an impossible layout"),
        ({"dtype": "float8_e4m3fn", "kv_scales": (1.0,) * 15}, "the offerer states an impossible layout"),
        ({"dtype": "float8_e4m3fn", "kv_scales": (0.0,) * 16}, "the offerer states an impossible layout"),
        ({"dtype": "float8_e4m3fn", "kv_scales": (float("nan"),) * 16}, "the offerer states an impossible layout"),
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


def test_float8_with_other_scales_is_other_kv_and_equal_scales_written_in_another_way_are_not():
    ones, none = replace(FLOAT8, kv_scales=(1.0,) * 16), replace(FLOAT8, kv_scales=())
    says = "kv_scales differ: the KV of the two is quantised in different ways"
    assert difference(FLOAT8, none) == says
    for other in (none, replace(none, page_size_tokens=32)):
        assert obstacle(FLOAT8, other, other_dtypes=True) == says
        assert obstacle(ones, other, other_dtypes=False) is None
    whole = replace(FLOAT8, num_kv_heads=8, tp_size=1, tp_rank=0, kv_scales=(9.0,) * 32)
    assert obstacle(FLOAT8, whole, other_dtypes=False) == says
    scales = torch.full((2, 8, 2), 9.0)
    scales[:, 4:] = torch.tensor(FLOAT8.kv_scales).view(2, 4, 2)
    assert obstacle(FLOAT8, replace(whole, kv_scales=tuple(scales.flatten().tolist())), other_dtypes=False) is None


@pytest.mark.parametrize("here", [1, 2, 4, 8])
@pytest.mark.parametrize("there", [1, 2, 4, 8])
def test_the_ranks_of_a_group_have_each_head_of_a_rank_once(here, there):
    for rank in range(here):
        layout = replace(LAYOUT, num_kv_heads=8 // here, tp_size=here, tp_rank=rank)
        found = ranks_in_common(layout, there)
        assert [head for heads in found.values() for head in heads] == list(layout.heads)
        for other in range(there):
            group = replace(LAYOUT, num_kv_heads=8 // there, tp_size=there, tp_rank=other)
            assert found.get(other, range(0)) == heads_in_common(layout, group)


@pytest.mark.parametrize("tp_size", [0, 3, 16])
def test_heads_that_cannot_be_split_evenly_are_refused(tp_size):
    with pytest.raises(PeerError, match=f"8 KV heads cannot be split over {tp_size} ranks"):
        ranks_in_common(LAYOUT, tp_size)


def test_bytes_of_a_dtype_that_cannot_be_told_are_still_copied_as_they_are():
    quantised = replace(LAYOUT, dtype="int4")
    assert obstacle(quantised, quantised, False) is None
    assert "cannot be converted" in (obstacle(quantised, replace(quantised, page_size_tokens=32), False) or "")
