"""WiCore: Gemma 3 served from a Redis message queue."""

__version__ = "0.1.0"
