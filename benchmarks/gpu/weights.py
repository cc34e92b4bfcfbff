"""Time of putting weights on the GPU: `python -m benchmarks.gpu.weights [--layers 4] [--folder /tmp]`.

Made-up weights in the shapes of Gemma 3 27B; a checkpoint written on the spot (bfloat16, 27B's embedding and
so many of its layers), read from the page cache; and, to compare, copies of one pinned buffer. First, and
alone with `--host`, the host's part: the checkpoint into ordinary memory, through its mapping and by reads,
in turns, by so many threads. `--readers` and `--piece-mib` try other rings than the engine's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt import weights as weights_module
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.weights import RandomWeights, load_weights
from wicore.gemma3.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from wicore.gemma3.config import Gemma3Config, published
from wicore.gemma3.hf_config import config_to_hf

COPIED = 1 << 30


def write_checkpoint(folder: Path, config: Gemma3Config) -> int:
    """bfloat16 values near 0.01, repeated; returns bytes of the weights."""
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    values = np.random.default_rng(0).normal(0, 0.01, 16 << 20).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header: dict[str, object] = {}
    end = 0
    for name, shape in config.tensor_shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for at in range(0, end, len(block)):
            file.write(block[: min(len(block), end - at)])
    return end


def report(what: str, size: int, seconds: float) -> None:
    print(f"{what:44} {size / 1e9:7.2f} GB {seconds:8.3f} s {size / seconds / 1e9:7.1f} GB/s", flush=True)


def pieces_of(checkpoint: Checkpoint, size: int, reads: bool) -> Iterator[tuple[StoredTensor, int, int]]:
    """(tensor, first row, end) of at most `size` bytes; without `reads` to be copied from the mapping."""
    for name in checkpoint.names():
        tensor = checkpoint.stored(name)
        if not reads:
            tensor = dataclasses.replace(tensor, place=None)
        rows, step = len(tensor.raw), max(1, size // tensor.raw.shape[1])
        for first in range(0, rows, step):
            yield tensor, first, min(first + step, rows)


def host_reads(folder: Path, size: int, threads: int, rounds: int = 5) -> None:
    """Medians; both ways take tensors piece by piece, as the engine does, into buffers that are there."""
    piece = weights_module.PIECE_BYTES
    buffers: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
    for _ in range(threads):
        buffers.put(np.ones(piece, np.uint8))

    def load(tensor: StoredTensor, first: int, end: int) -> None:
        buffer = buffers.get()
        tensor.read_into(buffer[: (end - first) * tensor.raw.shape[1]], first, end)
        buffers.put(buffer)

    seconds: dict[str, list[float]] = {"the mapping": [], "reads": []}
    for _ in range(rounds):
        for way, times in seconds.items():
            checkpoint = open_checkpoint(folder)  # a mapping with no page in it yet
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda rows: load(*rows), pieces_of(checkpoint, piece, way == "reads")))
            times.append(time.perf_counter() - start)
    for way, times in seconds.items():
        report(f"into memory through {way}, {threads} threads", size, statistics.median(times))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--model", default="gemma-3-27b", help="whose shapes, e.g. gemma-3-1b")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written")
    parser.add_argument("--host", action="store_true", help="without a GPU")
    parser.add_argument("--threads", default="1,2,4,8", help="that read into ordinary memory")
    parser.add_argument("--readers", type=int, default=weights_module.READERS)
    parser.add_argument("--piece-mib", type=int, default=weights_module.PIECE_BYTES >> 20)
    options = parser.parse_args()
    weights_module.READERS, weights_module.PIECE_BYTES = options.readers, options.piece_mib << 20
    config = published(options.model)
    assert config is not None
    small = dataclasses.replace(
        config, layers=options.layers, layer_kinds=config.layer_kinds[: options.layers]
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(Path(folder), small)
        print(f"{os.cpu_count()} cores, pieces of {options.piece_mib} MiB, a ring of {options.readers}")
        for threads in options.threads.split(","):
            host_reads(Path(folder), size, int(threads))
        if not options.host:
            on_card(config, Path(folder), size)


def on_card(config: Gemma3Config, folder: Path, size: int) -> None:
    device = CudaDevice()
    print(device.name)

    host, target, stream = device.allocate_host(COPIED), device.allocate(COPIED, "a copy"), device.stream()
    begin, end = device.event(True), device.event(True)
    host.array[::4096] = 1
    for turn in range(6):
        if turn == 1:
            begin.record(stream)
        device.copy(target.address, host.address, COPIED, stream)
    end.record(stream)
    end.wait()
    report("copies of a pinned buffer", 5 * COPIED, end.elapsed_ms(begin) / 1e3)
    host.free()
    target.free()

    for turn in ("first", "again"):
        start = time.perf_counter()
        weights = load_weights(device, RandomWeights(config, 1))
        report(f"made up, {turn}", weights.total_bytes, time.perf_counter() - start)
        weights.free()

    for turn in ("first", "second", "third"):
        start = time.perf_counter()
        weights = load_weights(device, open_checkpoint(folder))
        report(f"bfloat16 checkpoint, {turn} time", size, time.perf_counter() - start)
        weights.free()
    start = time.perf_counter()
    _ = open_checkpoint(folder).content_digest
    report("its digest", size, time.perf_counter() - start)
    device.close()


if __name__ == "__main__":
    main()
