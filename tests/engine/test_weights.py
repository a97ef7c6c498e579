"""An unusable model folder is refused before anything is loaded, and the message names the file and the field."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import ModelError
from engine.model_config import FAMILIES, ModelConfig
from engine.weights import check_model, load_weights, model_fingerprint, resolve_dtype, weights_fingerprint
from kernels.ops import TorchOps
from tests.engine.tiny_models import DYNAMIC_ORIGINAL_MAX, WINDOW, edit_config, write_tiny_model

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("pristine"), "llama3")


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def refuses(folder, *words):
    with pytest.raises(ModelError, match=".*".join(map(re.escape, words))):
        check_model(folder)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Splits the tensors over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load(folder, dtype=torch.float32, on_progress=None):
    return load_weights(folder, ModelConfig.load(folder), dtype, TorchOps(), on_progress)


def test_a_sharded_model_loads_like_a_single_file(pristine, folder):
    shard(folder)
    single, sharded = load(pristine), load(folder)
    assert torch.equal(single.head.data, sharded.head.data)
    for ours, theirs in zip(single.layers, sharded.layers, strict=True):
        assert torch.equal(ours.qkv.data, theirs.qkv.data)
        assert torch.equal(ours.down.data, theirs.down.data)


def test_loading_reports_progress_up_to_one(folder):
    fractions = []
    load(folder, on_progress=fractions.append)
    assert fractions == [0.5, 1.0]


def test_loaded_weights_stay_as_they_were_when_the_file_is_overwritten(folder):
    weights = load(folder)
    before = weights.norm.clone(), weights.layers[1].down.data.clone()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert torch.equal(weights.norm, before[0])
    assert torch.equal(weights.layers[1].down.data, before[1])


@pytest.mark.parametrize(
    ("stored", "asked", "result"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float16", "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_follows_the_model_unless_told_otherwise(folder, stored, asked, result):
    edit_config(folder, dtype=..., torch_dtype=stored)
    assert resolve_dtype(asked, ModelConfig.load(folder)) == result


def test_float16_weights_keep_every_bit_as_float32(folder):
    change_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].half()}))
    stored = load_file(folder / "model.safetensors")[KEY]
    assert torch.equal(load(folder).layers[1].qkv.data[128:192], stored.float())


def test_unsupported_dtype_is_refused(folder):
    with pytest.raises(ModelError, match=r"int8.*float32 or bfloat16"):
        resolve_dtype("int8", ModelConfig.load(folder))


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop(KEY))
    refuses(folder, KEY, "missing")


def test_a_surplus_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.ones(2)}))
    refuses(folder, "model.safetensors", "model.layers.0.adapter.weight", "not part of LlamaForCausalLM")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda tensors: tensors.update({KEY: torch.ones(8, 64)}))
    refuses(folder, "model.safetensors", KEY, "[8, 64]", "[64, 64]")


def test_integer_weights_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}))
    refuses(folder, "model.safetensors", KEY, "I8", "F32, BF16, F16")


def test_buffers_and_tied_heads_that_older_exports_store_are_ignored(tmp_path):
    folder = write_tiny_model(tmp_path, "llama-tied")
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": torch.ones(199, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    weights = load(folder)
    assert weights.head.data is weights.embedding


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, "model.safetensors", "truncated")


def test_a_file_of_garbage_is_refused(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    refuses(folder, "model.safetensors", "not a safetensors file")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refuses(folder, str(folder), "model.safetensors")


def test_an_index_that_names_a_missing_shard_is_refused(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(folder, "model.safetensors.index.json", "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_malformed_index_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    refuses(folder, "model.safetensors.index.json", "weight_map")


def test_an_index_cannot_name_files_outside_its_folder(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refuses(folder, "model.safetensors.index.json", "weight_map", "../x.safetensors")


def test_a_tensor_stored_twice_is_refused(folder):
    shard(folder)
    first, second = (folder / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refuses(folder, second.name, name, first.name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architectures", "GPT2LMHeadModel", *FAMILIES]),
        ({"architectures": ...}, ["architectures"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "64"]),
        ({"num_hidden_layers": -2}, ["num_hidden_layers", "-2"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "num_attention_heads"]),
        ({"head_dim": 33}, ["head_dim", "33", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "no"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type", "longrope", "llama3, yarn"]),
        ({"rope_scaling": {"type": "mrope"}}, ["rope_scaling.type", "mrope"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "object"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "missing"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, ["rope_scaling.factor", "two"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["rope_scaling.low_freq_factor", "missing"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "for all layers"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ],
)
def test_a_config_that_is_not_supported_is_refused(folder, changes, words):
    edit_config(folder, **changes)
    refuses(folder, "config.json", *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufffe"])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json", "JSON")


def test_a_folder_without_config_is_refused(tmp_path):
    refuses(tmp_path, "config.json", "cannot be read")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        ({"layer_types": ["full_attention", "chunked", "full_attention"]}, ["layer_types[1]", "chunked"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"layer_types": None, "max_window_layers": "all"}, ["max_window_layers", "all"]),
    ],
)
def test_window_fields_that_make_no_sense_are_refused(tmp_path, changes, words):
    folder = write_tiny_model(tmp_path, "qwen2-window")
    edit_config(folder, **changes)
    refuses(folder, "config.json", *words)


def test_windows_follow_the_fields_of_each_family(tmp_path):
    mistral = write_tiny_model(tmp_path / "mistral", "mistral")
    assert ModelConfig.load(mistral).sliding_windows == (WINDOW, WINDOW)
    edit_config(mistral, sliding_window=None)
    assert ModelConfig.load(mistral).sliding_windows == (None, None)
    qwen = write_tiny_model(tmp_path / "qwen", "qwen2-window")
    assert ModelConfig.load(qwen).sliding_windows == (None, WINDOW, WINDOW)
    edit_config(qwen, layer_types=...)
    assert ModelConfig.load(qwen).sliding_windows == (None, WINDOW, WINDOW)
    edit_config(qwen, use_sliding_window=False)
    assert ModelConfig.load(qwen).sliding_windows == (None, None, None)


def test_old_and_new_rotary_keys_mean_the_same(folder):
    new = ModelConfig.load(folder).rope
    scaling = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scaling["type"] = scaling.pop("rope_type")
    theta = scaling.pop("rope_theta")
    edit_config(folder, rope_parameters=..., rope_scaling=scaling, rope_theta=theta)
    assert ModelConfig.load(folder).rope == new


def test_prompts_share_kv_only_where_it_does_not_depend_on_their_length(folder, tmp_path):
    dynamic = ModelConfig.load(write_tiny_model(tmp_path, "llama-dynamic"))
    assert dynamic.shareable_tokens(DYNAMIC_ORIGINAL_MAX) == DYNAMIC_ORIGINAL_MAX
    assert dynamic.shareable_tokens(DYNAMIC_ORIGINAL_MAX + 1) == 0
    assert ModelConfig.load(folder).shareable_tokens(10**6) > 10**9


def test_fingerprints_differ_when_kv_would_and_only_then(pristine, folder):
    def fingerprint(where, dtype=torch.float32):
        return model_fingerprint(weights_fingerprint(where, ModelConfig.load(where)), dtype)

    original = fingerprint(pristine)
    shard(folder)
    assert fingerprint(folder) == original
    assert fingerprint(folder, torch.bfloat16) != original
    edit_config(folder, rms_norm_eps=1e-3)
    assert fingerprint(folder) != original


def test_a_changed_weight_changes_the_fingerprint(pristine, folder):
    config = ModelConfig.load(pristine)
    change_tensors(folder, lambda tensors: tensors[KEY].mul_(1.5))
    assert weights_fingerprint(folder, config) != weights_fingerprint(pristine, config)
