"""The one model a process serves, as API and worker both see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from wicore import __version__
from wicore.config import Settings
from wicore.engine.sizing import longest
from wicore.gemma3.checkpoint import Checkpoint, open_checkpoint, resolve_model
from wicore.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, its tokenizer and what is served of it."""

    name: str
    """What clients call it."""
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    context: int
    """Longest sequence served, in tokens: the least of what the checkpoint, `model.max_context` and the KV
    cache (`hmt.device_tokens`, `hmt.host_bytes`) allow. A GPU's memory does not tell: an engine that has too
    little for such a sequence does not start."""
    created_s: int
    """Unix time of the checkpoint."""

    @property
    def fingerprint(self) -> str:
        """Of what text depends on beside the request: while it stays, a seed gives the same text."""
        described = f"{__version__} {self.checkpoint.fingerprint}"
        return f"fp_{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def load_model(settings: Settings) -> Model:
    """Open the checkpoint that `model.path` names. Weights stay on disk.

    Raises CheckpointError when it is missing or bad, with the command or setting that helps.
    """
    path = resolve_model(settings.model.path)
    checkpoint = open_checkpoint(path)
    limits = (checkpoint.config.max_context, settings.model.max_context, longest(settings, checkpoint.config))
    return Model(
        name=settings.model.name or _default_name(path),
        checkpoint=checkpoint,
        tokenizer=Tokenizer.from_model_bytes(checkpoint.tokenizer_model),
        context=min(limit for limit in limits if limit is not None),
        created_s=int(path.stat().st_mtime),
    )


def _default_name(path: Path) -> str:
    return path.resolve().stem if path.is_file() else path.resolve().name
