"""Giving memory back to the system that was needed for a moment."""

from __future__ import annotations

import ctypes
from functools import cache

import onnxruntime as ort


def give_back_freed_memory() -> None:
    """What loading freed would else stay with the process (glibc only; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def shrinking() -> ort.RunOptions:
    """For a run at whose end the sessions' common allocator gives back what nothing lies in."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
