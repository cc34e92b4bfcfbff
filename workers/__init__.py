"""Processes: the long-lived worker that runs an engine."""
