"""Write a checkpoint as a Hugging Face folder in bfloat16."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wicore.gemma3.checkpoint import Bytes, Checkpoint, Float
from wicore.gemma3.hf_config import config_to_hf

_CHUNK_ELEMENTS = 1 << 22
"""Elements converted at once: the embedding table alone would take 0.7 GB as float32."""


def to_bfloat16(values: Float) -> NDArray[np.uint16]:
    """Finite float32 values rounded to bfloat16 bits, half to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def save_bfloat16(checkpoint: Checkpoint, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Write `model.safetensors`, the two configuration files and `tokenizer.model` into `folder`.

    Only the text model is written. `on_progress(done, total)` counts elements. On return everything
    is on disk, so that a rename of the folder publishes a whole checkpoint.
    """
    config = checkpoint.config
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.stop_token_ids)}
    _write(folder / "config.json", json.dumps(config_to_hf(config, "bfloat16"), indent=2).encode())
    _write(folder / "generation_config.json", json.dumps(generation, indent=2).encode())
    _write(folder / "tokenizer.model", checkpoint.tokenizer_model)

    shapes = config.tensor_shapes()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts aligned
    done = 0
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            tensor = checkpoint.stored(name)
            rows = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
            for start in range(0, len(tensor.raw), rows):
                chunk: Bytes = tensor.raw[start : start + rows]
                values = tensor.decode(chunk)
                file.write(to_bfloat16(values).astype("<u2", copy=False).tobytes())
                done += values.size
                on_progress(done, config.parameters)
        _sync(file.fileno(), file.flush)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file.fileno(), file.flush)


def _sync(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)
