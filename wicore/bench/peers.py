"""What a peer was measured to do, to be printed beside ours: a JSON file, as in benchmarks/peers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wicore.errors import ConfigError

Line = dict[str, object]
Unit = Literal["tokens/s", "ms", "s"]


class PeerFigure(BaseModel):
    """One measurement; `batch`, `prompt` and `output` are 0 where they mean nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measurement: str
    batch: int = Field(ge=0)
    prompt: int = Field(ge=0)
    """Tokens of each prompt."""
    output: int = Field(ge=0)
    """Tokens generated for each."""
    value: float = Field(gt=0)
    unit: Unit


class PeerResults(BaseModel):
    """A peer on one card with one model and one format of weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    card: str
    """Part of what our engine calls the device, e.g. "NVIDIA H200"."""
    model: str
    dtype: str
    lines: tuple[PeerFigure, ...]

    def beside(
        self, measurement: str, batch: int, prompt: int, output: int, value: float, unit: Unit
    ) -> Line:
        """The peer's figure for the same, and how many times better ours is; empty without one."""
        for line in self.lines:
            same = (line.measurement, line.batch, line.prompt, line.output)
            if same == (measurement, batch, prompt, output) and line.unit == unit:
                ratio = value / line.value if unit == "tokens/s" else line.value / value
                return {
                    "peer": f"{self.name} {self.dtype}",
                    "peer_value": line.value,
                    "ratio": round(ratio, 2),
                }
        return {}


def read_peer(path: Path, *, device: str, model: str) -> PeerResults:
    """The file's figures. Raises ConfigError when it cannot be read, or is of another card or model."""
    try:
        results = PeerResults.model_validate_json(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"--peer-results: {path}: {err.strerror}") from None
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"--peer-results: {path}: {where}: {first['msg']}") from None
    if results.card not in device or results.model != model:
        raise ConfigError(
            f"--peer-results: {path} was measured with {results.model} on {results.card}, and this is {model}"
            f" on {device}: leave it out"
        )
    return results
