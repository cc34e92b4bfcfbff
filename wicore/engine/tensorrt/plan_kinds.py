"""The networks that there are plans of: the text model's segments and the vision tower's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from wicore.engine.tensorrt import networks, vision_networks
from wicore.engine.tensorrt.networks import Binding, Kind, Ops, SegmentShape, Tensor
from wicore.engine.tensorrt.vision_networks import VISION_KINDS, VisionKind, VisionShape

AnyKind: TypeAlias = Kind | VisionKind
AnyShape: TypeAlias = SegmentShape | VisionShape


def bindings(kind: AnyKind, shape: AnyShape) -> tuple[Binding, ...]:
    """What must be bound to run a network, inputs first."""
    if isinstance(shape, VisionShape):
        return vision_networks.bindings(cast(VisionKind, kind), shape)
    return networks.bindings(cast(Kind, kind), shape)


def define(kind: AnyKind, shape: AnyShape, ops: Ops[Tensor]) -> None:
    """Describe a network to `ops`."""
    if isinstance(shape, VisionShape):
        vision_networks.define(cast(VisionKind, kind), shape, ops)
    else:
        networks.define(cast(Kind, kind), shape, ops)


def rows_of(kind: AnyKind, shape: AnyShape, buckets: Sequence[int]) -> tuple[int, ...]:
    """The numbers of rows that a network is built for, ascending; a tower's have no buckets."""
    if isinstance(shape, VisionShape):
        return (shape.rows(cast(VisionKind, kind)),)
    return networks.rows_of(cast(Kind, kind), buckets)


def workspace_bytes(kind: AnyKind) -> int:
    """Most scratch memory for a kernel of a network: a tower's stays beside the KV all the time, for now and
    then an image."""
    return 256 << 20 if kind in VISION_KINDS else 4 << 30


def shape_from(kind: str, fields: Mapping[str, Any]) -> AnyShape:
    """The shape that `asdict` made these fields of. Raises TypeError for others."""
    return VisionShape(**fields) if kind in VISION_KINDS else SegmentShape(**fields)
