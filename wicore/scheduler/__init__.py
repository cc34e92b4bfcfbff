"""The scheduler: which sequences run, and what each step computes for them."""

from wicore.scheduler.scheduler import Scheduler
from wicore.scheduler.sequence import Limits, SequenceRequest, TokenOut

__all__ = ["Limits", "Scheduler", "SequenceRequest", "TokenOut"]
