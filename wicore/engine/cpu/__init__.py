"""Gemma 3 on the CPU, by ONNX Runtime."""

from wicore.engine.cpu.engine import CpuEngine

__all__ = ["CpuEngine"]
