"""How much sooner a long prompt's first token comes from the tiers than by computing it.

`python -m benchmarks.kv_restore [--tokens 32000]`: the real Gemma 3 270M on the CPU engine. In one run: a
prompt is computed from nothing; a second one pushes it from the device; it comes again, from host memory;
then a new process serves it from the file. Each first token is timed from the request to the token, and all
must be the same. Every line has what the copies could do at best on this machine, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from wicore.bench.hardware import describe
from wicore.bench.restore import TieredServer, disk_read_rate, kv_bytes
from wicore.config import Settings, load_settings
from wicore.engine.factory import create_engine
from wicore.model import load_model

Line = dict[str, Any]
GIB = 2**30


class Server(TieredServer):
    """A server of the model's own engine."""

    def __init__(self, settings: Settings) -> None:
        self.model = load_model(settings)
        self.engine = create_engine(settings, self.model)
        super().__init__(settings, self.engine)

    def close(self) -> None:
        super().close()
        self.engine.close()


def prompt(tokens: int, seed: int) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(1000, 250_000, tokens - 1).tolist()]


def settings_of(folder: Path, tokens: int) -> Settings:
    """A device that holds one such prompt, host memory for three, a file for ten."""
    overrides = {
        "model.path": "gemma-3-270m",
        "hmt.device_tokens": tokens + 512,
        "hmt.host_bytes": int(1.5 * GIB),
        "hmt.nvme_path": str(folder),
        "hmt.nvme_bytes": 4 * GIB,
        "scheduler.max_batch": 4,
    }
    return load_settings([], environ={}, overrides=overrides)


def again(folder: Path, tokens: int) -> Line:
    """In a new process: the first token from the file."""
    server = Server(settings_of(folder, tokens))
    server.first_token(prompt(64, 99))  # the engine's own first step is no matter of the cache
    seconds, token = server.first_token(prompt(tokens, 1))
    report = server.cache.report()
    server.close()
    return {
        "seconds": seconds,
        "token": token,
        "hit_tokens": report["hit_tokens"],
        "direct_io": report["direct_io"],
    }


def measure(folder: Path, tokens: int) -> list[Line]:
    server = Server(settings_of(folder, tokens))
    layout = server.engine.info.layout
    server.first_token(prompt(64, 99))
    computed, token = server.first_token(prompt(tokens, 1))
    server.flush()
    server.first_token(prompt(tokens, 2))
    from_host, host_token = server.first_token(prompt(tokens, 1))
    hits = dict(server.cache.report()["hit_tokens"])  # type: ignore[call-overload]
    rates = server.cache.manager.traffic.rates
    copy_gbps = (rates.bytes_per_second(("host", "device")) or 0) / 1e9
    server.flush()
    server.close()
    command = [sys.executable, "-m", "benchmarks.kv_restore", "--again", str(folder), "--tokens", str(tokens)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    restarted = json.loads(output.splitlines()[-1])
    if not token == host_token == restarted["token"]:
        raise SystemExit(f"first tokens differ: {token}, {host_token}, {restarted['token']}")
    size = round(kv_bytes(layout, tokens) / 1e6)
    common = {"model": "gemma-3-270m", "prompt": tokens, "kv": layout.dtype, "kv_mb": size}
    common |= {"engine": server.engine.info.device, **describe()}
    return [
        {"measurement": "first token, computed", "seconds": round(computed, 3), **common},
        {
            "measurement": "first token, from host memory",
            "seconds": round(from_host, 3),
            "times_sooner": round(computed / from_host, 1),
            "hit_tokens": hits,
            "copy_gb_s": round(copy_gbps, 2),
            **common,
        },
        {
            "measurement": "first token, from the file in a new process",
            "seconds": round(restarted["seconds"], 3),
            "times_sooner": round(computed / restarted["seconds"], 1),
            "hit_tokens": restarted["hit_tokens"],
            "direct_io": restarted["direct_io"],
            "disk_read_gb_s": round(disk_read_rate(folder), 2),
            **common,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--folder", type=Path, help="where the file lies; a temporary folder if left out")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.again:
        print(json.dumps(again(given.again, given.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for line in measure(Path(folder), given.tokens):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
