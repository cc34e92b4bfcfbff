"""Time of an image in the vision tower on this machine's card, with random weights in a published shape.

    python -m benchmarks.gpu.vision [--model gemma-3-27b] [--images 20] [--unchecked] [--plans] [--peer]

Checks every part on random inputs against float64 and times it alone, then times whole images, as the engine
computes them: by our kernels where the card has them, else (`--plans`: everywhere) by TensorRT's plans, which
are built when they are missing. `--peer` times the same tower by transformers and PyTorch (half, its fused
attention, a CUDA graph too), without the projector. Times are medians of CUDA graph replays between events;
`encode` adds the copies and the host's part. The bound is that of dense products of half at the card's top
clock, by its data sheet (`wicore.engine.tensorrt.ceilings`).

An image's operations are those of its matrix products, two a multiplication and addition, for P patches of E
elements, L layers of width H and inner width I, T tokens of width D:

    2 P E H + L (2 P (4 H^2 + 2 H I) + 4 P^2 H) + 2 T H D

With the published tower (P 4096, E 588, L 27, H 1152, I 4304) that is 5.46 TFLOP. Needs what the engine
needs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from tests.device_arrays import download, upload
from tests.gpu.segment_trial import SegmentTrial
from tests.reference import relative_error
from tests.vision_reference import network, random_inputs
from wicore.engine.tensorrt.ceilings import ceilings
from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.timing import median_ms
from wicore.engine.tensorrt.trt_api import installed_backends
from wicore.engine.tensorrt.vision import (
    TensorrtVision,
    TowerNetworks,
    open_vision_networks,
    open_vision_plans,
)
from wicore.engine.tensorrt.vision_attention import TowerAttention, tower_attention
from wicore.engine.tensorrt.vision_kernels import VisionKernels
from wicore.engine.tensorrt.vision_networks import VisionKind, VisionShape, flops
from wicore.engine.tensorrt.vision_weights import load_vision
from wicore.engine.tensorrt.weights import RandomWeights
from wicore.gemma3.config import VisionConfig, published

LIMIT = 5e-3
"""Relative error of a part, by the Euclidean norm."""


def check(
    device: CudaDevice, networks: TowerNetworks, kind: VisionKind, shape: VisionShape
) -> tuple[float, float]:
    """(largest relative error of an output, ms of a run)"""
    given = random_inputs(kind, shape)
    trial = SegmentTrial(device, kind, shape, given)
    expected, found = network(kind, shape, given), trial.run(networks, shape.rows(kind))
    error = max(relative_error(found[name], values) for name, values in expected.items())
    ms, _ = trial.milliseconds(networks, shape.rows(kind))
    trial.close()
    return error, ms


def check_attention(device: CudaDevice, attention: TowerAttention, shape: VisionShape) -> tuple[float, float]:
    """(relative error of the last patches', ms of all patches')"""
    given = random_inputs("vision_attention", shape)
    qkv, attended = (
        upload(device, given["qkv"]),
        device.allocate(2 * shape.patches * shape.hidden, "attended"),
    )
    stream = device.stream()
    ms = median_ms(device, stream, lambda: attention(stream, qkv.address, attended.address))
    found = download(device, attended.address, np.float16, (shape.patches, shape.hidden))[-shape.block :]
    error = relative_error(found, network("vision_attention", shape, given)["attended"])
    qkv.free()
    attended.free()
    return error, ms


def peer_ms(config: VisionConfig, images: int) -> float:
    """Median of an image through transformers' tower on this card, replayed as a graph."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    shape = SiglipVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )
    with torch.device("cuda"):
        model = SiglipVisionModel._from_config(shape, attn_implementation="sdpa").half().eval()
        pixels = torch.randn(1, 3, config.image_size, config.image_size, dtype=torch.float16)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            model(pixels)
        with torch.cuda.graph(graph, stream=stream):
            model(pixels)
        times = []
        for _ in range(images):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", default="gemma-3-27b", help="whose width rows have")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--unchecked", action="store_true", help="whole images alone")
    parser.add_argument("--plans", action="store_true", help="by TensorRT, whatever else there is")
    parser.add_argument("--peer", action="store_true", help="transformers and PyTorch on the same card, too")
    options = parser.parse_args()
    config = published(options.model)
    if config is None or config.vision is None:
        parser.error(f"--model: {options.model} is no published model with images; gemma-3-27b is one")
    device, shape, layers = CudaDevice(), VisionShape.of(config), config.vision.layers
    side = config.vision.image_size
    started = time.monotonic()
    opened = open_vision_plans(shape, device) if options.plans else open_vision_networks(config, device)
    if opened is None:
        parser.error("no TensorRT is installed")
    networks: TowerNetworks = opened
    versions = ", ".join(f"{b.name} {b.version}" for b in installed_backends())
    by = "our kernels" if isinstance(networks, VisionKernels) else versions
    print(f"{device.name}, {by}, float16 with float32 residual stream, {options.model}")
    print(f"ready in {time.monotonic() - started:.1f} s", flush=True)
    missed = False
    if not options.unchecked:
        parts: dict[VisionKind, int] = {"vision_first": 1, "vision_middle": layers - 1, "vision_last": 1}
        measured = [(kind, count, *check(device, networks, kind, shape)) for kind, count in parts.items()]
        attention = tower_attention(device, config, shape, networks)
        measured.append(("attention", layers, *check_attention(device, attention, shape)))
        attention.free()
        print(f"{'part':<18}{'error':>10}{'ms':>9}{'runs':>6}{'ms in all':>11}")
        for part, count, error, ms in measured:
            missed |= not error < LIMIT
            note = "" if error < LIMIT else "  <- over the limit"
            print(f"{part:<18}{error:>10.1e}{ms:>9.4f}{count:>6}{ms * count:>11.2f}{note}", flush=True)
    vision = TensorrtVision(device, config, load_vision(device, RandomWeights(config)), networks)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    first = [vision.encode(pixels) for pixels in images]
    again = [vision.encode(pixels) for pixels in images]
    same = all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    differ = not np.array_equal(first[0], first[1])
    print(f"the same image gives the same rows: {same}; another gives others: {differ}")
    ms = median_ms(device, vision.stream, vision.launch, options.images)
    walls = []
    for i in range(options.images):
        before = time.perf_counter()
        vision.encode(images[i % 2])
        walls.append((time.perf_counter() - before) * 1e3)
    total = flops(shape, layers)
    bound = ceilings(device).get("matmul_flop_s", 0.0)
    share = f", {total / (ms / 1e3) / bound:.0%} of {bound / 1e12:.0f}" if bound else ""
    print(f"an image: {ms:.2f} ms on the card; encode {statistics.median(walls):.2f} ms")
    print(f"{total / 1e12:.2f} TFLOP, {total / ms / 1e9:.0f} TFLOP/s{share}")
    for what, size in device.report().items():
        print(f"{what}: {size / 2**20:,.0f} MiB")
    if options.peer:
        ms = peer_ms(config.vision, options.images)
        print(f"transformers' tower by PyTorch: {ms:.2f} ms, without the projector")
    vision.close()
    device.close()
    return int(missed or not same or not differ)


if __name__ == "__main__":
    raise SystemExit(main())
