"""Runs the CUDA kernels on the CPU, one fibre a CUDA thread; see device.py."""

from tests.emulation.device import EmulatedDevice, EmulationError

__all__ = ["EmulatedDevice", "EmulationError"]
