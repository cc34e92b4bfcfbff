"""Measurements: one JSON line each, with the hardware, the setting and the share of the ceiling."""
