"""Time of putting weights on the GPU: `python -m benchmarks.gpu.weights [--layers 4] [--folder /tmp]`.

Made-up weights in the shapes of Gemma 3 27B; a checkpoint written on the spot (bfloat16, 27B's embedding and
so many of its layers), read from the page cache; and, to compare, copies of one pinned buffer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.weights import RandomWeights, load_weights
from wicore.gemma3.checkpoint import open_checkpoint
from wicore.gemma3.config import Gemma3Config, published

COPIED = 1 << 30


def write_checkpoint(folder: Path, config: Gemma3Config) -> int:
    """bfloat16 values near 0.01, repeated; returns bytes of the weights."""
    (folder / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written")
    options = parser.parse_args()
    config = published("gemma-3-27b")
    assert config is not None
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
        report(f"27B made up, {turn}", weights.total_bytes, time.perf_counter() - start)
        weights.free()

    small = dataclasses.replace(
        config, layers=options.layers, layer_kinds=config.layer_kinds[: options.layers]
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_checkpoint(Path(folder), small)
        for turn in ("first", "second", "third"):
            start = time.perf_counter()
            weights = load_weights(device, open_checkpoint(folder))
            report(f"bfloat16 checkpoint, {turn} time", size, time.perf_counter() - start)
            weights.free()
    device.close()


if __name__ == "__main__":
    main()
