"""Settings: one frozen object, built once at start.

Sources, later ones win: the defaults here, YAML files, environment variables `WICORE_<SECTION>__<KEY>`,
keyword overrides (the command line). An unknown key or a bad value raises ConfigError naming the key,
the value and what is allowed; nothing is ever ignored. An empty variable counts as unset, and `null`
in a variable means None.

The text under each setting is its documentation: `wicore config defaults` and `configs/default.yaml`
are made from it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, YamlConfigSettingsSource
from pydantic_settings.sources.utils import parse_env_vars

from wicore.access.keys import ConfiguredKey
from wicore.errors import ConfigError

if TYPE_CHECKING:
    from wicore.gemma3.config import Gemma3Config, VisionConfig

REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "sentinel://")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


_ORIGINS = r"^(\*|https?://[^/\s,*]+(,https?://[^/\s,*]+)*)$"


class ApiSettings(_Section):
    host: str = "127.0.0.1"
    """Address the API listens on; 0.0.0.0 for every interface."""
    port: int = Field(8000, ge=1, le=65535)
    """Port the API listens on."""
    workers: int = Field(1, ge=1, le=64)
    """Gunicorn processes."""
    max_body_bytes: int = Field(20 * 2**20, ge=1024)
    """Longest request body; a longer one is refused."""
    max_file_bytes: int = Field(64 * 2**20, ge=1024)
    """Largest file that is taken by /v1/files; files lie in Redis."""
    max_files_bytes: int = Field(512 * 2**20, ge=1024)
    """What the files of one client may take together."""
    max_sockets: int = Field(2000, ge=1)
    """Open websockets, event streams and calls that wait for their answer, a process."""
    max_client_sockets: int = Field(1000, ge=1)
    """How many of these one key may have."""
    keys: tuple[ConfiguredKey, ...] | None = Field(None, repr=False)
    """API keys: name, key or sha256, limits; besides those of `wicore keys`. See docs/operation.md."""
    allow_anonymous: bool = False
    """Serve everybody while there are no keys, even where other machines reach api.host."""
    cors_origins: str | None = Field(None, pattern=_ORIGINS)
    """Pages that may call, as https://a.example,https://b.example, or * for all; unset: those from here."""
    cancel_on_disconnect: bool = True
    """Cancel the job of a chat or completion call whose client closed the connection before the answer."""
    stream_buffer: int = Field(1024, ge=16)
    """Events held for a slow reader before it is dropped; it can resume from the log."""


class RedisSettings(_Section):
    url: str | None = None
    """redis://, rediss://, unix:// or sentinel://host,host/master; unset: `wicore up` starts a Valkey."""
    prefix: str = Field("wicore", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Every key and channel begins with it."""
    data_dir: str | None = None
    """Where the embedded Valkey keeps its data; unset: ~/.local/share/wicore/valkey."""
    wait_replicas: int = Field(0, ge=0, le=16)
    """Replicas that must hold a job before it is accepted; 0: the master alone."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(REDIS_SCHEMES):
            raise ValueError("must begin with " + ", ".join(REDIS_SCHEMES))
        return url


class QueueSettings(_Section):
    lease_s: float = Field(20.0, ge=0.2, le=3600)
    """A worker that does not renew its jobs for this many seconds loses them to another."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Workers a job may take down with it before it fails."""
    max_jobs: int = Field(10_000, ge=1)
    """Jobs that may wait on one level before new ones are refused."""
    max_tokens: int = Field(20_000_000, ge=1)
    """Tokens, of prompts and of output expected, that may wait on one level before new jobs are refused."""
    max_wait_s: float | None = Field(None, gt=0)
    """Seconds that a job may wait for its first start before it expires; unset: no bound but its own."""
    retention_s: int = Field(86_400, ge=1)
    """Seconds that a finished job's record, log and result are kept."""
    background_share: float = Field(0.1, ge=0, lt=1)
    """Share of pops that look at the lowest level first, so that it is not starved."""
    stall_s: float = Field(120.0, ge=1)
    """A worker whose engine has been in one step for this many seconds gives up its jobs' leases."""
    image_stall_s: float = Field(600.0, ge=1)
    """The same of a worker that has been at one image for this many seconds."""
    drain_s: float = Field(20.0, ge=0)
    """A stopping worker finishes for this many seconds, then hands back what is left."""


_BASE64_SECRET = r"^whsec_([A-Za-z0-9+/]{4}){8,21}([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


class WebhookSettings(_Section):
    secret: str | None = Field(None, pattern=_BASE64_SECRET, repr=False)
    """Signs webhooks: whsec_ and 24 to 64 random bytes in base64; unset: no job may ask for a webhook."""
    max_attempts: int = Field(8, ge=1, le=20)
    """Deliveries tried before a webhook is given up."""
    retry_s: float = Field(5.0, ge=0.1, le=600)
    """Seconds before the second attempt; each later wait is five times as long, up to half an hour."""
    allow_private: bool = False
    """Deliver to loopback, private and reserved addresses too, not to public ones only."""


class ModelSettings(_Section):
    path: str = "gemma-3-270m"
    """A checkpoint folder, a GGUF file, or a name that `wicore model fetch` knows."""
    name: str | None = None
    """What clients call it; unset: the folder's name."""
    max_context: int | None = Field(None, ge=16)
    """Tokens; unset: what the checkpoint allows."""
    max_images: int = Field(16, ge=0, le=256)
    """Images that a request may have; 0: none, and a vision tower is not loaded."""
    max_image_bytes: int = Field(10 * 2**20, ge=1)
    """Largest image, as the file that it is."""
    max_image_pixels: int = Field(50_000_000, ge=1)
    """Largest image, in pixels: it is unpacked in memory, with some bytes for each."""
    image_cache_bytes: int = Field(256 * 2**20, ge=0)
    """What a worker may keep of images encoded lately, so that the next turn of a chat need not again."""

    def tower(self, config: Gemma3Config) -> VisionConfig | None:
        """The vision tower that is used of a model; None: it has none, or no images are allowed."""
        return config.vision if self.max_images else None


class EngineSettings(_Section):
    kind: Literal["cpu", "null", "tensorrt"] = "cpu"
    """cpu: ONNX Runtime; tensorrt: an NVIDIA GPU; null: computes nothing, to measure what is around it."""
    weights: Literal["float32", "float16", "int8"] | None = None
    """Weight format: int8 (unset) or float32 on the CPU, float16 with tensorrt."""
    kv: Literal["float32", "float16", "int8"] | None = None
    """KV format: float32 on the CPU or float16 with tensorrt (unset), or int8: smaller, on both."""
    device_index: int = Field(0, ge=0)
    """Which GPU, as CUDA counts them."""
    device_memory_bytes: int | None = Field(None, ge=0)
    """What weights, working memory and KV may take of a GPU's memory; unset: 92 % of what is free."""
    invariant: bool = False
    """tensorrt: text is bitwise independent of the batch and of how prompts are cut; prompts take longer."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0: one a core."""
    null_step_ms: float = Field(5.0, ge=0)
    """Step time of the null engine, in milliseconds."""
    plan_rows: str = Field("64,512,2048,8192", pattern=r"^[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*$")
    """Rows that TensorRT plans are built for; a step uses the next larger, several if none is."""

    @field_validator("kind", mode="before")
    @classmethod
    def _null_is_a_name(cls, kind: object) -> object:
        # YAML, and so a variable, reads the word as None.
        return "null" if kind is None else kind


class SchedulerSettings(_Section):
    max_batch: int = Field(16, ge=1, le=1024)
    """Sequences that run together."""
    token_budget: int = Field(512, ge=16)
    """New tokens a step: one for each decoding sequence, the rest, which must hold an image, for prompts."""


class HmtSettings(_Section):
    block_tokens: int = Field(32, ge=16, le=128)
    """Positions a KV block holds; 16, 32, 64 or 128."""
    device_tokens: int | None = Field(None, ge=256)
    """Positions the device pool holds, cached ones too; unset: 16384, with tensorrt what memory allows."""
    prefix_cache: bool = True
    """Keep the KV of finished prompts, so that a request that begins alike starts from it."""
    host_bytes: int | None = Field(None, ge=0)
    """Host memory for what the device pool has no room for; 0: none; unset: 512 MiB, or eight windows."""
    nvme_path: str | None = None
    """Folder of the file tier, which survives restarts; each worker takes a folder in it; unset: none."""
    nvme_bytes: int = Field(4 * 2**30, ge=0)
    """Size of a worker's files there; allocated at its start."""
    window_share: float = Field(0.5, gt=0, lt=1)
    """Share of host memory and files for the windows at which a prefix can be resumed."""
    checkpoint_tokens: int = Field(8192, ge=0)
    """Keep such a window every so many tokens of a prompt, besides its end and where prompts part; 0: not."""
    policy: Literal["a2cr", "lru", "lfu", "arc", "slru"] = "a2cr"
    """Which cached block goes first; see docs/hmt.md."""
    attention_weight: float = Field(0.1, ge=0, le=100)
    """A2CR: exponent of the attention that a block drew; 0: attention does not count."""
    frequency_weight: float = Field(1.0, gt=0, le=100)
    """A2CR: exponent of how often a block was used."""
    recency_tokens: float | None = Field(None, gt=0)
    """A2CR: tokens served in which an unused block's score falls by a factor e; unset: found by trial."""
    frequency_tokens: float | None = Field(None, gt=0)
    """A2CR: tokens served in which a use loses a factor e of its weight; unset: from the pool's turnover."""
    look_ahead: int = Field(8, ge=0, le=256)
    """Waiting jobs whose prefixes a full worker brings from the file in advance."""

    @field_validator("block_tokens")
    @classmethod
    def _power_of_two(cls, tokens: int) -> int:
        if tokens & (tokens - 1):
            raise ValueError("must be 16, 32, 64 or 128")
        return tokens


class TelemetrySettings(_Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""
    access_log: bool = True
    """Write a line of JSON to standard output for each request to the API."""
    log_prompts: bool = False
    """Put the bodies of requests, and so prompts, in the access log; they are private unless you say so."""
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    """Send traces of jobs to this collector, by OTLP over HTTP (http://host:4318); unset: no traces."""


class Settings(_Section):
    api: ApiSettings = ApiSettings()
    redis: RedisSettings = RedisSettings()
    queue: QueueSettings = QueueSettings()
    webhooks: WebhookSettings = WebhookSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    hmt: HmtSettings = HmtSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


# --- loading ------------------------------------------------------------------------------------

PREFIX = "WICORE_"
NOT_SETTINGS = frozenset({"WICORE_CONFIG", "WICORE_CACHE", "WICORE_API_KEY"})
"""Variables with the prefix that are no settings: the YAML files to read, the folder for models, and the key
that commands send."""


class _Readable(Settings, BaseSettings):
    """The settings in the form that pydantic-settings' sources read; never instantiated."""

    model_config = SettingsConfigDict()


class _Layer(NamedTuple):
    """One source of settings: its values by dotted key, and each key as its author wrote it."""

    source: str
    values: Mapping[str, Any]
    written: Mapping[str, str]


def load_settings(
    file: str | Path | Sequence[str | Path] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Build the settings from their sources.

    Args:
        file: YAML file or files, later ones win; None: those that WICORE_CONFIG names, separated as
            in PATH.
        environ: the environment; None: that of this process.
        overrides: values by dotted key, e.g. {"api.port": 8000}; None values are skipped, so that
            options left out on a command line can be passed as they are.

    Raises ConfigError for a file that cannot be read, an unknown key, or a bad value.
    """
    return load_with_sources(file, environ, overrides)[0]


def load_with_sources(
    file: str | Path | Sequence[str | Path] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """As `load_settings`; also says where each setting came from, by dotted key."""
    environ = os.environ if environ is None else environ
    layers = [_yaml_layer(path) for path in _files(file, environ)]
    layers.append(_environment_layer(environ))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    layers.append(_Layer("the command line", given, {key: key for key in given}))

    nested: dict[str, dict[str, Any]] = {}
    origins: dict[str, _Layer] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if key not in FIELDS:
                raise _unknown(layer, key)
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
            origins[key] = layer
    try:
        settings = Settings.model_validate(nested)
    except ValidationError as err:
        raise _bad_value(err, origins) from None
    sources = {key: origins[key].source if key in origins else "default" for key in FIELDS}
    return settings, sources


def config_files(environ: Mapping[str, str]) -> list[str]:
    """The YAML files that WICORE_CONFIG names."""
    return [path for path in environ.get("WICORE_CONFIG", "").split(os.pathsep) if path]


def mask_passwords(text: str) -> str:
    """`text` with the passwords of every URL in it, before its host or in its query, replaced by ***."""
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", re.sub(r"(://[^:@/\s]*):\S*@", r"\1:***@", text))


def shown(settings: Settings) -> dict[str, Any]:
    """Every setting in force by dotted key, fit to be read by others: no secret, no password."""
    values: dict[str, Any] = {}
    for key, field in FIELDS.items():
        section, name = key.split(".")
        values[key] = _masked(field, getattr(getattr(settings, section), name))
    return values


def _masked(field: FieldInfo, value: Any) -> Any:
    if not field.repr:
        return value if value is None else "***"
    return mask_passwords(value) if isinstance(value, str) else value


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words: "a whole number, 1 to 65535"."""
    a_name = get_origin(field.annotation) is Literal
    kinds = (field.annotation,) if a_name else get_args(field.annotation) or (field.annotation,)
    words = next(_words(kind) for kind in kinds if kind is not type(None))
    for rule in field.metadata:
        for name, comparison in _BOUNDS.items():
            if getattr(rule, name, None) is not None:
                words += f", {comparison} {getattr(rule, name)}"
    return words + (", or null" if type(None) in kinds else "")


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list"
    return "one of " + ", ".join(get_args(kind)) if get_origin(kind) is Literal else _KINDS[kind]


_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOUNDS = {"ge": "at least", "gt": "over", "le": "at most", "lt": "below", "pattern": "matching"}


def default_yaml() -> str:
    """Every setting with its default, its meaning and what it may be: `configs/default.yaml`."""
    lines = ["# Every setting with its default. Made by `wicore config defaults`; a file of yours needs"]
    lines += ["# only what differs.", ""]
    for section, section_field in Settings.model_fields.items():
        lines.append(f"{section}:")
        for name, field in section_field.default.__class__.model_fields.items():
            lines.append(f"  # {field.description} ({allowed(field)})")
            lines.append(f"  {name}: {scalar(field.default)}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def scalar(value: Any) -> str:
    """A setting's value as YAML writes it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").rstrip("\n")


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for section, section_field in Settings.model_fields.items():
        for name, field in section_field.default.__class__.model_fields.items():
            yield f"{section}.{name}", field


FIELDS: Mapping[str, FieldInfo] = dict(_fields())
"""Every setting by dotted key."""


def variable(key: str) -> str:
    """The environment variable that sets `key`."""
    return PREFIX + key.replace(".", "__").upper()


def _files(file: str | Path | Sequence[str | Path] | None, environ: Mapping[str, str]) -> list[Path]:
    if file is None:
        return [Path(path) for path in config_files(environ)]
    return [Path(file)] if isinstance(file, str | Path) else [Path(path) for path in file]


def _yaml_layer(path: Path) -> _Layer:
    if not path.is_file():
        raise ConfigError(f"{path}: no such settings file; see --config and WICORE_CONFIG", param=str(path))
    try:
        data = YamlConfigSettingsSource(_Readable, yaml_file=path)()
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as err:
        raise ConfigError(
            f"{path}: not readable as YAML: {' '.join(str(err).split())}", param=str(path)
        ) from None
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path}: must be a mapping of sections, as configs/default.yaml is", param=str(path)
        ) from None
    values = _flat(data)
    return _Layer(str(path), values, {key: f"{key} in {path}" for key in values})


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    written = {
        name.upper().removeprefix(PREFIX).lower().replace("__", ".", 1): name
        for name, value in environ.items()
        if name.upper().startswith(PREFIX) and name.upper() not in NOT_SETTINGS and value
    }
    source = EnvSettingsSource(
        _Readable, env_prefix=PREFIX, env_nested_delimiter="__", env_parse_none_str="null"
    )
    known = {variable(key): environ[name] for key, name in written.items() if key in FIELDS}
    source.env_vars = parse_env_vars(known, parse_none_str="null")
    unknown = {key: environ[name] for key, name in written.items() if key not in FIELDS}
    return _Layer("the environment", {**unknown, **_flat(source())}, written)


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Sections to dotted keys; what is no section keeps its name, and is then found unknown."""
    values: dict[str, Any] = {}
    for section, content in data.items():
        if isinstance(content, Mapping):
            values.update({f"{section}.{name}": value for name, value in content.items()})
        elif content is not None or section not in Settings.model_fields:
            values[str(section)] = content
    return values


def _unknown(layer: _Layer, key: str) -> ConfigError:
    written = layer.written[key]
    as_author_writes = variable if layer.source == "the environment" else str
    if key in Settings.model_fields:
        inside = ", ".join(as_author_writes(known) for known in FIELDS if known.startswith(f"{key}."))
        return ConfigError(f"{written}: is a section; set one of {inside}", param=written)
    # A right name in a wrong section is far from the right key as text, so look for it first.
    same_name = [known for known in FIELDS if known.split(".")[1] == key.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(key, FIELDS, n=1)
    if close:
        fix = "did you mean " + " or ".join(as_author_writes(known) for known in close) + "?"
    else:
        fix = "`wicore config defaults` lists every setting"
    return ConfigError(f"{written}: unknown setting; {fix}", param=written)


def _bad_value(err: ValidationError, origins: Mapping[str, _Layer]) -> ConfigError:
    first = err.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    written = origins[key].written[key]
    value = origins[key].values[key]
    told = _masked(FIELDS[key], value if isinstance(value, str) else scalar(value))
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("tuple", "list")
    if inner := first["loc"][2:]:  # of a list: which entry, and which field of it
        reason = f"{'.'.join(map(str, inner))}: {reason}"
    return ConfigError(
        f"{written}: {told} is not allowed: {reason} (allowed: {allowed(FIELDS[key])})", param=written
    )
