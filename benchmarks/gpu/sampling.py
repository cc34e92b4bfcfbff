"""Time of drawing tokens on the GPU, from 262,208 logits a row, and how many tokens differ from the CPU's.

`python -m benchmarks.gpu.sampling [--rows 1 16 64]`. Microseconds of a captured step (four kernels and the
copy of the results), by events over many replays that take turns at logits in different memory; and
microseconds of the host for pack and upload.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from wicore.engine.tensorrt.cuda import CudaDevice
from wicore.engine.tensorrt.sampler import Sampler
from wicore.request import SamplingParams
from wicore.sampling import SamplingState, sample

VOCAB = 262_208
PLACES = 4
"""Logits that take turns, so that the cache holds none of them from the replay before."""

CASES: dict[str, tuple[SamplingParams, bool]] = {
    "greedy": (SamplingParams(temperature=0), False),
    "no filter": (SamplingParams(), False),
    "top-p 0.95, flat": (SamplingParams(top_p=0.95), False),
    "top-p 0.95, peaked": (SamplingParams(top_p=0.95), True),
    "top-k 64 and top-p 0.95, flat": (SamplingParams(top_k=64, top_p=0.95), False),
    "top-k 64 and top-p 0.95, peaked": (SamplingParams(top_k=64, top_p=0.95), True),
    "top-k 400, flat": (SamplingParams(top_k=400), False),
    "min-p 0.05, peaked": (SamplingParams(min_p=0.05), True),
    "greedy, 20 logprobs": (SamplingParams(temperature=0, logprobs=20), False),
    "top-k 64, 5 logprobs, penalties": (
        SamplingParams(top_k=64, logprobs=5, repetition_penalty=1.1, presence_penalty=0.5),
        True,
    ),
}


def made_logits(rng: np.random.Generator, rows: int, peaked: bool) -> np.ndarray:
    logits = rng.standard_normal((rows, VOCAB), np.float32) * np.float32(2)
    if peaked:
        for row in logits:
            row[rng.integers(0, VOCAB, 40)] += rng.uniform(5, 12, 40).astype(np.float32)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--replays", type=int, default=200)
    options = parser.parse_args()
    device = CudaDevice()
    stream = device.stream()
    most = max(options.rows)
    sampler = Sampler(device, VOCAB, most)
    places = [device.allocate(4 * VOCAB * most, "logits") for _ in range(PLACES)]
    host = device.allocate_host(4 * VOCAB * most)
    rng = np.random.default_rng(0)
    flat, peaked = made_logits(rng, most, False), made_logits(rng, most, True)
    print(f"{device.name}; {VOCAB} logits a row")
    print(f"{'case':34} {'rows':>4} {'us':>8} {'pack us':>8} {'upload us':>9} {'differ':>7}")
    for name, (params, is_peaked) in CASES.items():
        logits = peaked if is_peaked else flat
        prompt = rng.integers(0, VOCAB, 1000).tolist() if params.repetition_penalty != 1.0 else []
        host.array[:] = logits.view(np.uint8).reshape(-1)
        for rows in options.rows:
            states = [SamplingState(params, seed, prompt) for seed in range(rows)]
            graphs = []
            for place in places:
                device.copy(place.address, host.address, 4 * VOCAB * rows, stream)
                graphs.append(
                    device.capture(stream, lambda at=place.address, n=rows: sampler.launch(stream, n, at))
                )
            sampler.pack(states)
            sampler.upload(stream)
            graphs[0].launch(stream)
            stream.synchronize()
            expected = sample(logits[:rows].copy(), states)
            differ = sum(a.id != b.id for a, b in zip(sampler.read(rows), expected, strict=True) if a)
            packing = uploading = 0.0
            for _ in range(50):
                start = time.perf_counter()
                sampler.pack(states)
                packed = time.perf_counter()
                sampler.upload(stream)
                uploading += time.perf_counter() - packed
                packing += packed - start
                stream.synchronize()
            begin, end = device.event(True), device.event(True)
            for replay in range(options.replays + 20):
                if replay == 20:
                    begin.record(stream)
                graphs[replay % PLACES].launch(stream)
            end.record(stream)
            end.wait()
            us = 1e3 * end.elapsed_ms(begin) / options.replays
            host_us = (packing * 2e4, uploading * 2e4)
            print(
                f"{name:34} {rows:4} {us:8.1f} {host_us[0]:8.1f} {host_us[1]:9.1f} {differ:3} of {rows}",
                flush=True,
            )
            for graph in graphs:
                graph.close()
    sampler.close()
    device.close()


if __name__ == "__main__":
    main()
