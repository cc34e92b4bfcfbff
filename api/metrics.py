"""`GET /metrics`: the KV caches of all live workers, for Prometheus.

Everything comes from the heartbeats at the moment of the call, so each API process gives the same answer and
none keeps a count of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from api.services import current

door = Blueprint("metrics", __name__)


@door.get("/metrics")
def metrics() -> Response:
    collector = CacheCollector(current().heartbeats())
    return Response(generate_latest(collector), content_type=CONTENT_TYPE_LATEST)


class CacheCollector:
    """The metrics of the KV caches that some heartbeats tell of.

    What a heartbeat leaves out, as one of an older worker may, has no sample.
    """

    def __init__(self, heartbeats: Sequence[Mapping[str, Any]]) -> None:
        """`heartbeats` as `alive_workers` gives them; `kv` of each as the worker's status has it."""
        self._caches = [(beat["worker"], beat["kv"]) for beat in heartbeats if beat.get("kv")]

    def collect(self) -> Iterator[Metric]:
        yield self._blocks()
        yield self._bytes_moved()
        yield self._counter(
            "wicore_kv_hit_tokens", "Prompt tokens found in the cache, by the tier they were in.", "tier"
        )
        yield self._counter(
            "wicore_kv_miss_blocks", "Blocks that were sought and had to be computed, by reason.", "reason"
        )
        yield self._move_seconds()
        yield self._victim_ages()

    def _of(self, name: str) -> Iterator[tuple[str, str, Any]]:
        """Worker, key and value of every entry that the caches have under a name."""
        for worker, cache in self._caches:
            for key, value in cache.get(name, {}).items():
                yield worker, key, value

    def _blocks(self) -> Metric:
        family = GaugeMetricFamily(
            "wicore_kv_blocks",
            "KV blocks by what they are: free, used by a sequence, or cached. The states add up to the pool.",
            labels=("worker", "tier", "pool", "state"),
        )
        for worker, tier, pools in self._of("tiers"):
            for pool, counts in pools.items():
                for state in ("free", "used", "cached"):
                    family.add_metric((worker, tier, pool, state), counts[state])
        return family

    def _bytes_moved(self) -> Metric:
        family = CounterMetricFamily(
            "wicore_kv_bytes_moved",
            "Bytes of KV blocks moved from one tier to another.",
            labels=("worker", "pool", "source", "target"),
        )
        for worker, way, pools in self._of("moved_bytes"):
            for pool, moved in pools.items():
                family.add_metric((worker, pool, *_ends(way)), moved)
        return family

    def _counter(self, metric: str, meaning: str, label: str) -> Metric:
        """A counter by one label, from the entry that has the metric's name."""
        family = CounterMetricFamily(metric, meaning, labels=("worker", label))
        for worker, key, count in self._of(metric.removeprefix("wicore_kv_")):
            family.add_metric((worker, key), count)
        return family

    def _move_seconds(self) -> Metric:
        family = HistogramMetricFamily(
            "wicore_kv_move_seconds",
            "How long a move took, from its start to its end.",
            labels=("worker", "source", "target"),
        )
        for worker, way, histogram in self._of("move_seconds"):
            family.add_metric((worker, *_ends(way)), _buckets(histogram), histogram["sum"])
        return family

    def _victim_ages(self) -> Metric:
        family = HistogramMetricFamily(
            "wicore_kv_victim_age_tokens",
            "Tokens computed by the worker between the last use of a block and when it had to leave a tier.",
            labels=("worker", "tier"),
        )
        for worker, tier, histogram in self._of("victim_age_tokens"):
            family.add_metric((worker, tier), _buckets(histogram), histogram["sum"])
        return family


def _ends(way: str) -> tuple[str, str]:
    """Source and target of `source>target`."""
    source, _, target = way.partition(">")
    return source, target


def _buckets(histogram: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each bound with how many values are not over it, as Prometheus has it; `counts` are of each bucket."""
    bounds = map(floatToGoString, (*histogram["bounds"], math.inf))
    return list(zip(bounds, accumulate(histogram["counts"]), strict=True))
