"""GGUF files: metadata, tensors, and the SentencePiece model they were made from.

The header is parsed here, not by the `gguf` package, whose reader wraps each of the vocabulary's
786,432 array elements in an array of its own: 8 s and 1 GB for the 270M model, against 0.3 s. Its
dequantisation kernels are used as they are.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from wicore.errors import CheckpointError
from wicore.gemma3.checkpoint import Bytes, Checkpoint, Float, StoredTensor
from wicore.gemma3.config import Gemma3Config
from wicore.gemma3.files import OpenFile, Place
from wicore.gemma3.hf_config import config_from_hf

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""


def open_gguf(path: Path) -> Checkpoint:
    """Open a Gemma 3 GGUF file as a checkpoint.

    Norm weights are stored with the 1 added; it is taken off. What the format leaves out (window
    pattern, local RoPE base, query scale) is Gemma 3's own. Raises CheckpointError when the file is
    truncated, not GGUF, one part of several, or another architecture.
    """
    fields, infos = _read_header(path)
    architecture = fields.get("general.architecture")
    if architecture != "gemma3":
        raise CheckpointError(f"{path}: expected architecture 'gemma3', found {architecture!r}")
    if fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: expected a whole model, found one of {fields['split.count']} parts; "
            "join them with llama.cpp's llama-gguf-split --merge"
        )
    data, opened = np.memmap(path, np.uint8, "r"), OpenFile.of(path)
    tensors = {
        _canonical_name(name): _stored_tensor(path, name, info, data, opened) for name, info in infos.items()
    }
    return Checkpoint(
        path, _config(path, fields, tensors), tensors, lambda: _sentencepiece_model(path, fields)
    )


def _canonical_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _stored_tensor(
    path: Path, name: str, info: _TensorInfo, data: Bytes, opened: OpenFile | None
) -> StoredTensor:
    block, block_bytes = GGML_QUANT_SIZES[info.kind]
    width, rows = math.prod(info.shape[-1:]), math.prod(info.shape[:-1])
    if width % block:
        raise CheckpointError(f"{path}: {name}: expected a width in blocks of {block}, found {width}")
    row_bytes = width // block * block_bytes
    end = info.offset + rows * row_bytes
    if end > data.size:
        raise CheckpointError(
            f"{path}: {name}: expected a file of at least {end} bytes, found {data.size}: it is truncated"
        )
    raw = data[info.offset : end].reshape(rows, row_bytes)
    decode = _decoder(info.kind, name.endswith("norm.weight"))
    place = Place(opened, info.offset) if opened else None
    return StoredTensor(info.shape, info.kind.name, raw, decode, place)


def _decoder(kind: GGMLQuantizationType, norm: bool) -> Callable[[Bytes], Float]:
    def decode(raw: Bytes) -> Float:
        try:
            values = np.array(dequantize(raw, kind), dtype=np.float32)
        except NotImplementedError:
            raise CheckpointError(f"expected a GGUF format with known decoding, found {kind.name}") from None
        return values - np.float32(1) if norm else values

    return decode


def _config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Gemma3Config:
    """The metadata, said in the keys of config.json, which has one validator."""

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"gemma3.{key}", default)
        if value is None:
            raise CheckpointError(f"{path}: expected metadata gemma3.{key}, found none")
        return value

    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{path}: expected tensor token_embd.weight, found none")
    layers, heads, epsilon = (
        field(key) for key in ("block_count", "attention.head_count", "attention.layer_norm_rms_epsilon")
    )
    hidden, head_dim = field("embedding_length"), field("attention.key_length")
    factor = field("rope.scaling.factor", 1.0)
    scaling = field("rope.scaling.type", "linear")
    eos = fields.get("tokenizer.ggml.eos_token_id", 1)
    # Chat models end a turn with eot; base models name none.
    ends = {"eos_token_id": [eos, fields.get("tokenizer.ggml.eot_token_id", eos)]}
    data = {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": field("feed_forward_length"),
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "max_position_embeddings": field("context_length"),
        "sliding_window": field("attention.sliding_window"),
        "sliding_window_pattern": field("attention.sliding_window_pattern", 6),
        # Only the 27B model scales queries by something else than its head_dim.
        "query_pre_attn_scalar": hidden / heads if layers == 62 else head_dim,
        "rope_scaling": {"rope_type": "default" if scaling == "none" else scaling, "factor": factor},
        "rope_theta": field("rope.freq_base", 1e6),
        "rope_local_base_freq": field("rope.freq_base_swa", 1e4),
        # Stored as float32, whose 1e-6 is not quite the double that config.json means.
        "rms_norm_eps": f"{epsilon:.6g}" if isinstance(epsilon, float) else epsilon,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id", 2),
    }
    return config_from_hf(data, ends, source=str(path))


def _sentencepiece_model(path: Path, fields: Mapping[str, Any]) -> bytes:
    """Rebuild Gemma's tokenizer.model from the vocabulary in the metadata.

    BPE with byte fallback, no dummy prefix, white space kept. GGUF writes user-defined pieces with
    plain spaces, and marks as control some pieces that Gemma's own model has as user-defined.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    if fields.get("tokenizer.ggml.model") != "llama":
        raise CheckpointError(
            f"{path}: expected a SentencePiece vocabulary (tokenizer.ggml.model 'llama'), "
            f"found {fields.get('tokenizer.ggml.model')!r}"
        )
    vocabulary = [fields.get(f"tokenizer.ggml.{key}", ()) for key in ("tokens", "scores", "token_type")]
    lengths = [len(column) for column in vocabulary]
    ids = {
        name: int(fields.get(f"tokenizer.ggml.{key}_token_id", default))
        for name, key, default in (
            ("pad", "padding", 0),
            ("eos", "eos", 1),
            ("bos", "bos", 2),
            ("unk", "unknown", 3),
        )
    }
    if min(lengths) != max(lengths) or max(ids.values()) >= lengths[0]:
        raise CheckpointError(
            f"{path}: expected as many scores and types as tokens, and special ids among them; "
            f"found {lengths} and {ids}"
        )
    unknown, control, user_defined = 2, 3, 4
    model: Any = proto.ModelProto()  # type: ignore[attr-defined]  # generated at import
    for i, (piece, score, kind) in enumerate(zip(*vocabulary, strict=True)):
        kind = int(kind)
        if i == ids["unk"]:
            kind = unknown
        elif i > ids["unk"] and kind == control:
            kind = user_defined
        text = piece.replace(" ", "\u2581") if kind == user_defined else piece
        model.pieces.add(piece=text, score=float(score), type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = 2
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    for name, i in ids.items():
        setattr(trainer, f"{name}_id", i)
        setattr(trainer, f"{name}_piece", model.pieces[i].piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(model.SerializeToString())


# --- the header ---------------------------------------------------------------------------------


class _Cursor:
    """Reads little-endian values from the start of a file."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        if self.at + count > len(self._data):
            raise EOFError
        self.at += count
        return self._data[self.at - count : self.at]

    def scalar(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return bytes(self.take(length)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<u4"), self.scalar("<u8")
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).copy()
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind}")
        return self.scalar(_SCALARS[kind])


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _TensorInfo]]:
    """(metadata, tensors by the file's names)."""
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path}: expected a GGUF file, found {path.stat().st_size} bytes")
    cursor = _Cursor(np.memmap(path, np.uint8, "r").data)
    magic = bytes(cursor.take(4))
    version = cursor.scalar("<u4")
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(f"{path}: expected GGUF version 2 or 3, found {magic!r} version {version}")
    tensor_count, field_count = cursor.scalar("<u8"), cursor.scalar("<u8")
    try:
        fields = {cursor.string(): cursor.value(cursor.scalar("<u4")) for _ in range(field_count)}
        entries = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    except EOFError:
        raise CheckpointError(
            f"{path}: expected {field_count} fields and {tensor_count} tensors, found the end of the file: "
            "it is truncated"
        ) from None
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: expected a GGUF header, found {err}") from None
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: expected general.alignment of 1 or more, found {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: _TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in entries}


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    dims = [cursor.scalar("<u8") for _ in range(cursor.scalar("<u4"))]
    kind = GGMLQuantizationType(cursor.scalar("<u4"))
    return name, tuple(reversed(dims)), kind, cursor.scalar("<u8")
