"""The scheduler: which sequences run, and what each step computes for them."""

from wicore.scheduler.scheduler import Limits, Scheduler, SequenceRequest, TokenOut

__all__ = ["Limits", "Scheduler", "SequenceRequest", "TokenOut"]
