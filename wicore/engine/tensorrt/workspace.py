"""An engine's kernels and what they work with: all that it has on the device besides weights and KV."""

from __future__ import annotations

from wicore.engine.base import KVLayout
from wicore.engine.tensorrt.attention import Attention
from wicore.engine.tensorrt.device import Device
from wicore.engine.tensorrt.image_rows import ImageUpload
from wicore.engine.tensorrt.limits import Limits
from wicore.engine.tensorrt.matmuls import Matmuls
from wicore.engine.tensorrt.norms import Norms
from wicore.engine.tensorrt.sampler import Sampler
from wicore.engine.tensorrt.work_buffers import allocate_work
from wicore.gemma3.config import Gemma3Config


class Workspace:
    """Compiles the kernels and allocates what they work with, for steps within `limits`.

    With `invariant` every product is made by the kernel for few rows. Raises EngineError for shapes that the
    kernels cannot do, and when memory does not suffice.
    """

    def __init__(
        self, device: Device, config: Gemma3Config, layout: KVLayout, limits: Limits, *, invariant: bool
    ) -> None:
        self.limits, self.invariant = limits, invariant
        samples = limits.samples
        self.buffers = allocate_work(device, config, limits.rows, samples)
        self.matmuls = Matmuls(device, invariant=invariant)
        self.norms = Norms(device, config)
        self.attention = Attention(device, config, layout, limits.rows, limits.listed, limits.entries)
        self.sampler = Sampler(device, config.vocab_size, samples)
        self.images = ImageUpload(device, 4 * limits.image_rows * config.hidden_size)
