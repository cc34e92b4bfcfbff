"""Weights on the GPU: half matrices, row-major [out, in], and float32 norm factors (1 + w).

A checkpoint's bytes are read into a ring of pinned buffers, which several threads fill and the copy engine
empties; the GPU makes half of them. The host only copies; quantised GGUF formats it decodes.
"""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wicore.engine.folding import fold_attention_norms
from wicore.engine.tensorrt.device import Buffer, Device, Function
from wicore.errors import EngineError
from wicore.gemma3.checkpoint import Checkpoint, StoredTensor
from wicore.gemma3.config import Gemma3Config

Float = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), by the thread that loads."""

PIECE_BYTES = 16 << 20
"""Size of a buffer of the ring: long enough for the copy engine's full speed."""
READERS = 16
"""Buffers of the ring, a thread each: one core copies 4 to 6 GB/s from the page cache, the link takes 50."""
_THREADS, _EACH = 256, 8  # as in convert.cu
_ALIGNMENT = 256
_DEVIATION_OF_NORMS = 0.1
_MATRICES = (
    *(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
    *(("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
)
"""Matrices of a layer; those of a group lie one behind the other and are used as one."""
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"),
    *("post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
)
_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class LayerWeights:
    """Device addresses of one decoder layer's weights."""

    qkv: int
    """[(heads + 2 * kv_heads) * head_dim, hidden]: rows of q, then k, then v."""
    out: int
    """[hidden, heads * head_dim]"""
    gate_up: int
    """[2 * inner, hidden]: rows of gate, then up."""
    down: int
    """[hidden, inner]"""
    input_norm: int
    post_attention_norm: int
    pre_mlp_norm: int
    post_mlp_norm: int
    q_norm: int
    """With the query scale, and for 8-bit KV the levels, in it (`fold_attention_norms`)."""
    k_norm: int


@dataclass(frozen=True)
class DeviceWeights:
    """Device addresses of a model's weights; `free` gives them back."""

    embedding: int
    """[vocab, hidden], the output head too. Not times sqrt(hidden)."""
    layers: tuple[LayerWeights, ...]
    final_norm: int
    total_bytes: int
    memory: Buffer

    def free(self) -> None:
        self.memory.free()


@dataclass(frozen=True)
class RandomWeights:
    """Weights made up on the device, for benchmarks: matrices of deviation 1 / sqrt(in), of
    bfloat16 numbers as in Gemma's checkpoints, and norms near 1.

    The same seed gives the same weights.
    """

    config: Gemma3Config
    seed: int = 0


def load_weights(
    device: Device,
    source: Checkpoint | RandomWeights,
    *,
    int8_kv: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> DeviceWeights:
    """Put a model's weights on the device.

    `int8_kv`: fold the norms of q and k for an 8-bit KV pool. Raises EngineError when the memory is
    not enough, or a weight is beyond half's range.
    """
    layout = _Layout(source.config)
    memory = device.allocate(layout.size, "the weights")
    try:
        _load_norms(device, layout, memory.address, source, int8_kv)
        if isinstance(source, RandomWeights):
            fill_matrices(device, layout, memory.address, source.seed, on_progress)
        else:
            load_matrices(device, layout, memory.address, source, on_progress)
            source.release_pages()
    except BaseException:
        memory.free()
        raise
    return layout.weights(memory)


class TensorLayout:
    """Where each tensor lies in one allocation: first matrices, as half, then vectors, as float32."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: of all that `add` may name, by name."""
        self.shapes = shapes
        self.at: dict[str, int] = {}
        self.matrices: list[str] = []
        self.vectors: list[str] = []
        """In ascending order of address, as are the matrices."""
        self.size = 0
        self.vectors_at = 0

    def add(self, *names: str) -> None:
        """Tensors behind those there are, one behind the other without a gap."""
        for name in names:
            shape = self.shapes[name]
            self.at[name] = self.size
            matrix = len(shape) == 2
            (self.matrices if matrix else self.vectors).append(name)
            self.size += math.prod(shape) * (2 if matrix else 4)
        self.size = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        if not self.vectors:
            self.vectors_at = self.size


class _Layout(TensorLayout):
    """Of the text model."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config.tensor_shapes())
        self.config = config
        self.add(_EMBEDDING)
        for layer in range(config.layers):
            for group in _MATRICES:
                self.add(*(f"model.layers.{layer}.{name}.weight" for name in group))
        for layer in range(config.layers):
            for name in _NORMS:
                self.add(f"model.layers.{layer}.{name}.weight")
        self.add(_FINAL_NORM)

    def weights(self, memory: Buffer) -> DeviceWeights:
        at = {name: memory.address + offset for name, offset in self.at.items()}
        return DeviceWeights(
            embedding=at[_EMBEDDING],
            layers=tuple(_layer(at, f"model.layers.{layer}.") for layer in range(self.config.layers)),
            final_norm=at[_FINAL_NORM],
            total_bytes=self.size,
            memory=memory,
        )


def _layer(at: Mapping[str, int], prefix: str) -> LayerWeights:
    def address(name: str) -> int:
        return at[f"{prefix}{name}.weight"]

    return LayerWeights(
        qkv=address("self_attn.q_proj"),
        out=address("self_attn.o_proj"),
        gate_up=address("mlp.gate_proj"),
        down=address("mlp.down_proj"),
        input_norm=address("input_layernorm"),
        post_attention_norm=address("post_attention_layernorm"),
        pre_mlp_norm=address("pre_feedforward_layernorm"),
        post_mlp_norm=address("post_feedforward_layernorm"),
        q_norm=address("self_attn.q_norm"),
        k_norm=address("self_attn.k_norm"),
    )


# --- norms ------------------------------------------------------------------------------------------


def _load_norms(
    device: Device, layout: _Layout, base: int, source: Checkpoint | RandomWeights, int8_kv: bool
) -> None:
    factors = {name: np.float32(1) + w for name, w in _norms(layout, source)}
    for layer in range(layout.config.layers):
        q, k = (f"model.layers.{layer}.self_attn.{part}_norm.weight" for part in "qk")
        factors[q], factors[k] = fold_attention_norms(
            factors[q], factors[k], layout.config.query_pre_attn_scalar, int8_kv=int8_kv
        )
    load_vectors(device, layout, base, factors)


def load_vectors(device: Device, layout: TensorLayout, base: int, values: Mapping[str, Float]) -> None:
    """Put the layout's vectors, given by name, where they lie."""
    host = device.allocate_host(layout.size - layout.vectors_at)
    try:
        for name, vector in values.items():
            start = layout.at[name] - layout.vectors_at
            host.array[start : start + vector.nbytes] = vector.view(np.uint8)
        stream = device.stream()
        device.copy(base + layout.vectors_at, host.address, host.size, stream)
        stream.synchronize()
    finally:
        host.free()


def _norms(layout: _Layout, source: Checkpoint | RandomWeights) -> Iterator[tuple[str, Float]]:
    """Every norm's w."""
    if isinstance(source, Checkpoint):
        for name in layout.vectors:
            yield name, source.read(name)
        return
    rng = np.random.default_rng(source.seed)
    for name in layout.vectors:
        w = rng.standard_normal(layout.shapes[name], np.float32)
        yield name, w * np.float32(_DEVIATION_OF_NORMS)


# --- matrices ---------------------------------------------------------------------------------------


def fill_matrices(
    device: Device,
    layout: TensorLayout,
    base: int,
    seed: int,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Make up the layout's matrices, as `RandomWeights` says."""
    kernel = device.compile("convert.cu", {}).function("fill_random")
    stream = device.stream()
    total = sum(2 * math.prod(layout.shapes[name]) for name in layout.matrices)
    done = 0
    for number, name in enumerate(layout.matrices):
        rows, width = layout.shapes[name]
        deviation = np.float32(width**-0.5)
        seed64 = np.int64((seed + 2**63) % 2**64 - 2**63)
        args = (base + layout.at[name], np.int64(rows * width), seed64, np.int32(number), deviation)
        kernel(stream, _blocks(rows * width), _THREADS, args, dependent=False)
        stream.synchronize()
        done += 2 * rows * width
        on_progress(done, total)


@dataclass(frozen=True)
class _Piece:
    """Rows of one tensor."""

    name: str
    tensor: StoredTensor
    first: int
    end: int
    target: int
    """Device address of the first row."""

    @property
    def stored_bytes(self) -> int:
        return (self.end - self.first) * int(self.tensor.raw.shape[1])


def load_matrices(
    device: Device,
    layout: TensorLayout,
    base: int,
    checkpoint: Checkpoint,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Put the layout's matrices where they lie. Raises EngineError for what half cannot hold."""
    pieces = [piece for name in layout.matrices for piece in _pieces(checkpoint, layout, base, name)]
    total = sum(piece.stored_bytes for piece in pieces)
    readers = max(1, min(READERS, len(pieces), os.cpu_count() or 1))
    largest = max(_staged_bytes(piece.tensor, piece.end - piece.first) for piece in pieces)
    ring: queue.SimpleQueue[_Stage] = queue.SimpleQueue()
    stages: list[_Stage] = []

    def load(piece: _Piece) -> int:
        try:
            stage = ring.get_nowait()
        except queue.Empty:  # a thread's first piece: all make theirs at the same time
            stage = _Stage(device, largest)
            stages.append(stage)
        try:
            stage.load(piece)
        finally:
            ring.put(stage)
        return piece.stored_bytes

    done = 0
    executor = ThreadPoolExecutor(readers, "weights")
    try:
        for future in as_completed([executor.submit(load, piece) for piece in pieces]):
            done += future.result()
            on_progress(done, total)
    finally:
        executor.shutdown(cancel_futures=True)
        for stage in stages:
            stage.free()


def _pieces(checkpoint: Checkpoint, layout: TensorLayout, base: int, name: str) -> Iterator[_Piece]:
    rows, width = layout.shapes[name]
    tensor = checkpoint.stored(name)
    if len(tensor.shape) > 2:  # a convolution's, whose other dimensions are one here
        tensor = replace(tensor, shape=(rows, width), raw=tensor.raw.reshape(rows, -1))
    step = max(1, PIECE_BYTES // _staged_bytes(tensor, 1))
    for first in range(0, rows, step):
        target = base + layout.at[name] + 2 * width * first
        yield _Piece(name, tensor, first, min(first + step, rows), target)


def _staged_bytes(tensor: StoredTensor, rows: int) -> int:
    """Bytes of so many rows in the form in which they go to the device."""
    return rows * (int(tensor.raw.shape[1]) if tensor.dtype in _PLAIN else 4 * tensor.shape[-1])


_PLAIN = {"BF16": "convert_bf16", "F16": "convert_f16", "F32": "convert_f32"}
"""Types that the device converts; others are decoded to F32 first."""


class _Stage:
    """One place of the ring: pinned memory, device memory and a stream. One thread at a time."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        module = device.compile("convert.cu", {})
        self._kernels: dict[str, Function] = {kind: module.function(name) for kind, name in _PLAIN.items()}
        self._stream = device.stream()
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host = device.allocate_host(size + _ALIGNMENT)
        try:
            self._on_device = device.allocate(size + _ALIGNMENT, "the buffers that weights are read through")
        except BaseException:
            self._host.free()
            raise
        self._unfit_at = size
        """Of the eight bytes in which the kernel counts what half cannot hold."""

    def load(self, piece: _Piece) -> None:
        """Returns when the piece is on the device."""
        tensor, device, stream = piece.tensor, self._device, self._stream
        kind, size = tensor.dtype, _staged_bytes(tensor, piece.end - piece.first)
        staged = self._host.array[:size]
        if kind in _PLAIN:
            tensor.read_into(staged, piece.first, piece.end)
        else:
            values = tensor.decode(tensor.raw[piece.first : piece.end])
            np.copyto(staged.view("<f4"), values.reshape(-1))
            kind = "F32"
        unfit = self._host.array[self._unfit_at : self._unfit_at + 8]
        there, unfit_there = self._on_device.address, self._on_device.address + self._unfit_at
        device.copy(there, self._host.address, size, stream)
        device.fill(unfit_there, 0, 8, stream)
        count = (piece.end - piece.first) * tensor.shape[-1]
        args = (there, piece.target, np.int64(count), unfit_there)
        self._kernels[kind](stream, _blocks(count), _THREADS, args, dependent=False)
        device.copy(self._host.address + self._unfit_at, unfit_there, 8, stream)
        stream.synchronize()
        found, largest = unfit.view(np.uint32)
        if found:
            value = float(largest.view(np.float32))
            raise EngineError(
                f"{piece.name}: expected weights within half precision's range of 65504, found {found} beyond"
                f" it in rows {piece.first} to {piece.end - 1}, of magnitude {value:.6g}; this model needs"
                " an engine with float32 or bfloat16 weights (engine.kind cpu)"
            )

    def free(self) -> None:
        self._on_device.free()
        self._host.free()


def _blocks(count: int) -> int:
    return -(-count // (_THREADS * _EACH))
