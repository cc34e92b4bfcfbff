"""Settings: one frozen object, built once at start.

Sources, later ones win: the defaults here, a YAML file, environment variables `WICORE_<SECTION>__<KEY>`,
keyword overrides (the command line). An unknown key or a bad value raises ConfigError naming the key,
the value and what is allowed; nothing is ever ignored.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiSettings(_Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    workers: int = Field(1, ge=1, le=64)
    """Gunicorn processes."""
    max_body_bytes: int = Field(20 * 2**20, ge=1024)
    max_sockets: int = Field(2000, ge=1)
    """Open websockets and event streams a process."""
    stream_buffer: int = Field(1024, ge=16)
    """Events held for a slow reader before it is dropped; it can resume from the log."""


class RedisSettings(_Section):
    url: str | None = None
    """redis://, rediss:// or unix://; unset: `wicore up` starts an embedded Valkey."""
    prefix: str = Field("wicore", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    data_dir: str | None = None
    """Where the embedded Valkey keeps its data; unset: the user's data folder."""


class QueueSettings(_Section):
    lease_s: float = Field(20.0, ge=0.2, le=3600)
    max_attempts: int = Field(3, ge=1, le=100)
    max_jobs: int = Field(10_000, ge=1)
    """Jobs waiting on all levels before new ones are refused."""
    retention_s: int = Field(86_400, ge=1)
    """How long a finished job's record, log and result are kept."""
    background_share: float = Field(0.1, ge=0, lt=1)
    """Share of pops that look at the lowest level first, so that it is not starved."""
    drain_s: float = Field(20.0, ge=0)
    """A stopping worker finishes for this long, then hands back what is left."""


class ModelSettings(_Section):
    path: str = "gemma-3-270m"
    """A checkpoint folder, a GGUF file, or a name that `wicore model fetch` knows."""
    name: str | None = None
    """What clients call it; unset: the folder's name."""
    max_context: int | None = Field(None, ge=16)
    """Tokens; unset: what the checkpoint allows."""


class EngineSettings(_Section):
    kind: Literal["cpu", "null", "tensorrt"] = "cpu"
    weights: Literal["int8", "float32"] = "int8"
    threads: int = Field(0, ge=0)
    """CPU threads; 0: one a core."""
    null_step_ms: float = Field(5.0, ge=0)
    """Step time of the null engine, which computes nothing: for measuring the service around it."""


class SchedulerSettings(_Section):
    max_batch: int = Field(16, ge=1, le=1024)
    """Sequences that run together."""
    token_budget: int = Field(512, ge=16)
    """New tokens a step: one for each decoding sequence, the rest for prompt chunks."""


class HmtSettings(_Section):
    block_tokens: int = Field(32, ge=8, le=256)
    device_tokens: int = Field(16_384, ge=256)
    """Positions the device pool holds, over all sequences and cached prefixes."""
    prefix_cache: bool = True


class TelemetrySettings(_Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False


class Settings(_Section):
    api: ApiSettings = ApiSettings()
    redis: RedisSettings = RedisSettings()
    queue: QueueSettings = QueueSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    hmt: HmtSettings = HmtSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
