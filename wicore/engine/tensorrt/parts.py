"""Several pieces of device memory taken as one."""

from __future__ import annotations

from collections.abc import Mapping

from wicore.engine.tensorrt.device import Buffer, Device

_ALIGNMENT = 256


def parts_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes that `allocate_parts` takes."""
    return sum(map(aligned, sizes.values()))


def allocate_parts(device: Device, sizes: Mapping[str, int], what: str) -> tuple[Buffer, dict[str, int]]:
    """Memory for parts of so many bytes, and the address of each, aligned to 256 bytes. `what` and errors as
    of `Device.allocate`."""
    memory = device.allocate(parts_bytes(sizes), what)
    at, address = {}, memory.address
    for name, size in sizes.items():
        at[name], address = address, address + aligned(size)
    return memory, at


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
