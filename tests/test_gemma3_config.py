"""Hyper-parameters: every published form of config.json gives the same numbers as transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wicore.errors import CheckpointError
from wicore.gemma3.config import PUBLISHED, published
from wicore.gemma3.hf_config import config_from_hf, config_of_folder, config_to_hf

# As published with the checkpoints, shortened to the keys that matter.
VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
CONFIG_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": VISION,
}
CONFIG_12B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": VISION,
}
CONFIG_27B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": VISION,
}
CONFIG_1B = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gemma-3-1b", CONFIG_1B),
        ("gemma-3-4b", CONFIG_4B),
        ("gemma-3-12b", CONFIG_12B),
        ("gemma-3-27b", CONFIG_27B),
    ],
)
def test_the_published_config_files_give_the_published_models(name: str, data: dict[str, Any]) -> None:
    assert config_from_hf(data, {}) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gemma-3-270m", 268.098),
        ("gemma-3-1b", 999.886),
        ("gemma-3-4b", 3880.263),
        ("gemma-3-12b", 11766.034),
        ("gemma-3-27b", 27009.346),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(name: str, millions: float) -> None:
    assert PUBLISHED[name].parameters / 1e6 == pytest.approx(millions, abs=1e-3)


def test_a_variant_has_the_configuration_of_its_size() -> None:
    assert published("gemma-3-4b-it") is PUBLISHED["gemma-3-4b"]
    assert published("gemma-3-4b-pt") is PUBLISHED["gemma-3-4b"]
    assert published("llama-3-8b") is None


def test_the_new_key_style_means_the_same_as_the_old() -> None:
    new = {key: value for key, value in CONFIG_1B.items() if "rope" not in key and "pattern" not in key}
    new["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    new["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    assert config_from_hf(new, {}) == PUBLISHED["gemma-3-1b"]


def test_linear_rope_is_read_in_every_key_style() -> None:
    styles: list[dict[str, Any]] = [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    ]
    for style in styles:
        assert config_from_hf(CONFIG_1B | style, {}).rope_scale == 8


def test_an_unusual_layer_pattern_is_kept() -> None:
    kinds = config_from_hf(CONFIG_1B | {"sliding_window_pattern": 4}, {}).layer_kinds
    assert [i for i, kind in enumerate(kinds) if kind == "global"] == [3, 7, 11, 15, 19, 23]


def test_stop_tokens_come_from_both_files_and_eos_is_the_first() -> None:
    config = config_from_hf(CONFIG_1B | {"eos_token_id": 1}, {"eos_token_id": [1, 106]})
    assert (config.eos_token_id, config.stop_token_ids) == (1, (1, 106))


def test_writing_a_config_and_reading_it_back_changes_nothing() -> None:
    for config in PUBLISHED.values():
        again = config_from_hf(
            config_to_hf(config, "bfloat16"), {"eos_token_id": list(config.stop_token_ids)}
        )
        assert again == replace(config, vision=None)  # that file is a text model's


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "expected model_type 'gemma3' or 'gemma3_text', found 'llama'"),
        ({"model_type": "gemma3", "text_config": None}, "text_config: expected a JSON object, found None"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"sliding_window": None}, "sliding_window"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads (3), found 4"),
        ({"layer_types": ["full_attention"]}, "expected num_hidden_layers (26) entries, found 1"),
        ({"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}}, "linear"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters.rope_type"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"model_type": "gemma3", "text_config": {}, "eos_token_id": -1}, "eos_token_id"),
    ],
)
def test_a_foreign_config_is_refused_with_the_key_and_what_was_found(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(CONFIG_1B | change, {}, source="some/config.json")
    assert "some/config.json" in caught.value.message
    assert says in caught.value.message


def test_a_multimodal_layout_without_a_tower_is_a_text_model() -> None:
    assert config_from_hf({k: v for k, v in CONFIG_4B.items() if k != "vision_config"}, {}).vision is None


def test_ids_and_tokens_of_images_are_those_of_the_file() -> None:
    other = {"mm_tokens_per_image": 64, "boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}
    vision = config_from_hf(CONFIG_4B | other, {}).vision
    assert vision is not None
    found = (vision.tokens, vision.start_token_id, vision.end_token_id, vision.soft_token_id)
    assert found == (64, 7, 8, 9)


@pytest.mark.parametrize(
    ("images", "tower", "says"),
    [
        ({}, {"hidden_size": 1150}, "expected a multiple of num_attention_heads (16), found 1150"),
        ({}, {"image_size": 900}, "image_size: expected a multiple of patch_size (14), found 900"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"num_channels": 1}, "num_channels"),
        ({}, {"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"mm_tokens_per_image": 200}, {}, "mm_tokens_per_image: expected the square of a divisor of 64"),
        ({"mm_tokens_per_image": 9}, {}, "mm_tokens_per_image: expected the square of a divisor of 64"),
        ({"mm_tokens_per_image": 4096}, {}, "at most sliding_window (1024), found 4096"),
        ({"image_token_index": -1}, {}, "image_token_index"),
        ({"vision_config": "siglip"}, {}, "vision_config: expected a JSON object, found 'siglip'"),
    ],
)
def test_a_tower_that_cannot_be_served_is_refused_with_the_key_and_what_was_found(
    images: dict[str, Any], tower: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(CONFIG_4B | {"vision_config": VISION | tower} | images, {}, source="some/config.json")
    assert "some/config.json" in caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", "[" * 100_000])
def test_a_config_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        config_of_folder(tmp_path)


def test_a_bad_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_1B))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id.*: expected"):
        config_of_folder(tmp_path)


def test_a_folder_is_read_with_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_1B | {"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    assert config_of_folder(tmp_path) == PUBLISHED["gemma-3-1b"]


def test_kv_of_window_layers_stops_growing_at_the_window() -> None:
    config = PUBLISHED["gemma-3-270m"]
    a_position = 2 * config.kv_heads * config.head_dim
    assert config.kv_elements(100) == config.kv_elements(100, windowed=False) == 18 * 100 * a_position
    assert config.kv_elements(1000) == (3 * 1000 + 15 * 512) * a_position
    assert config.kv_elements(1000, windowed=False) == 18 * 1000 * a_position
