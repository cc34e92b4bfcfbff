"""The way of image rows to the residual stream."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from wicore.engine.tensorrt.device import Device, HostBuffer, Stream

PlacedRows: TypeAlias = tuple[int, int, NDArray[np.float32]]
"""As `Pass.images` gives them: (first row of the pass, position where the image ends, [rows, hidden])."""

_BUFFERS = 4
"""Images whose copies may be under way."""


class ImageUpload:
    """Copies rows of images to the device through pinned memory, a buffer an image, in turn."""

    def __init__(self, device: Device, room: int = 0) -> None:
        """`room`: bytes of an image. Where one is larger, its buffer is taken anew when it comes."""
        self._device = device
        self._pinned: list[HostBuffer | None] = [
            device.allocate_host(room) if room else None for _ in range(_BUFFERS)
        ]
        self._sent = [device.event() for _ in self._pinned]
        self._next = 0

    def send(self, stream: Stream, rows: NDArray[np.float32], target: int) -> None:
        """Copy float32 [rows, hidden] to a device address, behind what `stream` holds.

        Waits where the copy of the last image but three has not been made yet. Not during a capture.
        """
        turn, self._next = self._next, (self._next + 1) % len(self._pinned)
        self._sent[turn].wait()
        pinned = self._pinned[turn]
        if pinned is None or pinned.size < rows.nbytes:
            if pinned is not None:
                pinned.free()
            pinned = self._pinned[turn] = self._device.allocate_host(rows.nbytes)
        np.copyto(pinned.array[: rows.nbytes].view(np.float32).reshape(rows.shape), rows)
        self._device.copy(target, pinned.address, rows.nbytes, stream)
        self._sent[turn].record(stream)
