"""`GET /metrics`: what the service does, for Prometheus.

Of workers, everything comes from their heartbeats at the moment of the call, and of the queue from Redis, so
each API process gives the same answer. What this API's processes count themselves (api/traffic.py) is added
up over all of them. Names and buckets of what is served are those of vLLM's engine, with our prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from api import openapi, traffic
from api.services import Services, current
from wicore.queue.tally import Tally, read_tally

Heartbeats = Sequence[Mapping[str, Any]]
"""As `alive_workers` gives them. What one leaves out, as one of an older worker may, has no sample."""
Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values, each with those of the labels."""

door = Blueprint("metrics", __name__)


@door.get("/metrics")
@openapi.describe("The service's metrics, for Prometheus", tag="service", answers=openapi.TEXT)
def metrics() -> Response:
    found = Families(service_families(current()))
    return Response(generate_latest(found) + traffic.exposition(), content_type=CONTENT_TYPE_LATEST)


class Families:
    """Families that are known already, in the form in which Prometheus's client takes them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def service_families(services: Services) -> Iterator[Metric]:
    """Of the whole service. Raises Unavailable."""
    heartbeats = services.heartbeats()
    waiting = {level.name.lower(): jobs for level, jobs in services.producer.depths().items()}
    waiting["suspect"] = services.producer.suspects()
    yield from queue_families(waiting, read_tally(services.redis, services.settings.redis.prefix))
    yield from worker_families(heartbeats)
    yield from cache_families(heartbeats)


# --- the queue ------------------------------------------------------------------------------------


def queue_families(waiting: Mapping[str, int], tally: Tally) -> Iterator[Metric]:
    """What the queue holds, and what has passed through it. `waiting`: jobs by priority, suspects apart."""
    yield _gauge(
        "wicore_num_requests_waiting",
        "Requests waiting in the queue by priority; `suspect` are those whose worker died.",
        ("priority",),
        (((priority,), jobs) for priority, jobs in waiting.items()),
    )
    yield _gauge("wicore_num_leases", "Requests that workers have.", (), [((), tally.leases)])
    yield _gauge("wicore_dead_letters_kept", "Messages given up and kept.", (), [((), tally.dead)])
    yield _counter("wicore_dead_letters", "Messages given up.", (), [((), tally.buried)])
    counts = dict(tally.counts)
    for name, meaning in (
        ("accepted", "Requests accepted."),
        ("leased", "Leases given to workers."),
        ("redelivered", "Requests taken from dead or hanging workers for another attempt."),
        ("handed_back", "Requests that stopping workers gave back."),
    ):
        yield _counter(f"wicore_requests_{name}", meaning, (), [((), counts.pop(name))])
    yield _counter(
        "wicore_requests_ended",
        "Requests that ended, in a worker or in the queue, by status.",
        ("status",),
        (((status,), count) for status, count in counts.items()),
    )


# --- workers --------------------------------------------------------------------------------------

LATENCIES = {
    "time_to_first_token": "Seconds from acceptance to the first token.",
    "inter_token_latency": "Seconds between a sequence's tokens.",
    "request_time_per_output_token": "Mean seconds between a request's tokens.",
    "request_queue_time": "Seconds from acceptance to the first step.",
    "request_prefill_time": "Seconds from the first step to the first token.",
    "request_decode_time": "Seconds from the first token to the last.",
    "request_inference_time": "Seconds from the first step to the last token.",
    "e2e_request_latency": "Seconds from acceptance to the end.",
}
"""Histograms of `latency` in a heartbeat; the metric adds `_seconds`."""
TOKENS = {
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens generated for a request.",
    "iteration_tokens": "Tokens computed by a step.",
}
"""Histograms of `requests` in a heartbeat."""


def worker_families(heartbeats: Heartbeats) -> Iterator[Metric]:
    """How jobs are served, by worker and model."""
    of, labels = _labelled(heartbeats), ("worker", "model_name")
    yield _gauge(
        "wicore_worker_info",
        "Workers alive; always 1.",
        (*labels, "version", "engine", "device", "weights"),
        (
            ((*who, *(str(beat.get(name, "")) for name in ("version", "engine", "device", "weights"))), 1)
            for who, beat in of
        ),
    )
    for name, meaning, path in (
        ("num_requests_running", "Requests that the worker has.", ("requests", "running")),
        ("num_sequences_running", "Sequences in the worker's batch.", ("requests", "sequences")),
        ("num_sequences_waiting", "Sequences in the worker, not in its batch.", ("requests", "waiting")),
        ("max_num_sequences", "Sequences that can run together.", ("slots",)),
    ):
        yield _gauge(f"wicore_{name}", meaning, labels, _found(of, path))
    for name, meaning, path in (
        ("prompt_tokens", "Prompt tokens of requests that got their first token.", ("requests",)),
        ("generation_tokens", "Tokens generated.", ("requests",)),
        ("num_preemptions", "Sequences that had to give up their slot.", ("requests",)),
    ):
        yield _counter(f"wicore_{name}", meaning, labels, _found(of, (*path, name)))
    yield _counter(
        "wicore_request_success",
        "Requests that ended in the worker, by reason.",
        (*labels, "finished_reason"),
        (
            ((*who, reason), count)
            for who, beat in of
            for reason, count in beat.get("requests", {}).get("finished", {}).items()
        ),
    )
    for name, meaning in LATENCIES.items():
        yield _histogram(f"wicore_{name}_seconds", meaning, labels, _found(of, ("latency", name)))
    for name, meaning in TOKENS.items():
        yield _histogram(f"wicore_{name}", meaning, labels, _found(of, ("requests", name)))
    yield _histogram(
        "wicore_image_encode_seconds",
        "Seconds of an image, from its file to what the model reads.",
        labels,
        _found(of, ("images", "encode_seconds")),
    )
    yield _counter(
        "wicore_image_cache_hits",
        "Images that were kept from before, and not encoded again.",
        labels,
        _found(of, ("images", "cache_hits")),
    )


def _labelled(heartbeats: Heartbeats) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    return [((beat["worker"], str(beat.get("model", ""))), beat) for beat in heartbeats]


def _found(
    of: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]], path: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What each heartbeat has under a path, where it has it."""
    for who, beat in of:
        value: Any = beat
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            yield who, value


# --- KV caches ------------------------------------------------------------------------------------


def cache_families(heartbeats: Heartbeats) -> Iterator[Metric]:
    """What the workers' KV caches hold and move."""
    caches = [(beat["worker"], beat["kv"]) for beat in heartbeats if beat.get("kv")]
    yield from _usage(caches)
    yield _gauge(
        "wicore_kv_blocks",
        "KV blocks by what they are: free, used by a sequence, or cached. The states add up to the pool.",
        ("worker", "tier", "pool", "state"),
        (
            ((worker, tier, pool, state), counts[state])
            for worker, tier, pools in _entries(caches, "tiers")
            for pool, counts in pools.items()
            for state in ("free", "used", "cached")
        ),
    )
    yield _counter(
        "wicore_kv_bytes_moved",
        "Bytes of KV blocks moved from one tier to another.",
        ("worker", "pool", "source", "target"),
        (
            ((worker, pool, *_ends(way)), moved)
            for worker, way, pools in _entries(caches, "moved_bytes")
            for pool, moved in pools.items()
        ),
    )
    for name, meaning, label in (
        ("hit_tokens", "Prompt tokens found in the cache, by the tier they were in.", "tier"),
        ("miss_blocks", "Blocks that were sought and had to be computed, by reason.", "reason"),
    ):
        samples = (((worker, key), count) for worker, key, count in _entries(caches, name))
        yield _counter(f"wicore_kv_{name}", meaning, ("worker", label), samples)
    yield _histogram(
        "wicore_kv_move_seconds",
        "How long a move took, from its start to its end.",
        ("worker", "source", "target"),
        (((worker, *_ends(way)), value) for worker, way, value in _entries(caches, "move_seconds")),
    )
    yield _histogram(
        "wicore_kv_victim_age_tokens",
        "Tokens computed by the worker between the last use of a block and when it had to leave a tier.",
        ("worker", "tier"),
        (((worker, tier), value) for worker, tier, value in _entries(caches, "victim_age_tokens")),
    )


def _usage(caches: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    """vLLM's view of the cache: how full the device pool is, and what prefixes were found."""
    pools = [
        (worker, pool, counts)
        for worker, tier, pools in _entries(caches, "tiers")
        if tier == "device"
        for pool, counts in pools.items()
    ]
    yield _gauge(
        "wicore_kv_cache_usage_perc",
        "Share of the device's KV blocks that sequences use, from 0 to 1.",
        ("worker", "pool"),
        (((worker, pool), counts["used"] / max(1, counts["total"])) for worker, pool, counts in pools),
    )
    opened = [((worker,), cache["opened_tokens"]) for worker, cache in caches if "opened_tokens" in cache]
    yield _counter(
        "wicore_prefix_cache_queries", "Prompt tokens looked up in the cache.", ("worker",), opened
    )
    hits = [((worker,), sum(cache.get("hit_tokens", {}).values())) for worker, cache in caches]
    yield _counter("wicore_prefix_cache_hits", "Prompt tokens found in the cache.", ("worker",), hits)


def _entries(caches: Iterable[tuple[str, Mapping[str, Any]]], name: str) -> Iterator[tuple[str, str, Any]]:
    """Worker, key and value of every entry that the caches have under a name."""
    for worker, cache in caches:
        for key, value in cache.get(name, {}).items():
            yield worker, key, value


def _ends(way: str) -> tuple[str, str]:
    """Source and target of `source>target`."""
    source, _, target = way.partition(">")
    return source, target


# --- families -------------------------------------------------------------------------------------


def _gauge(name: str, meaning: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, meaning: str, labels: Sequence[str], samples: Samples) -> Metric:
    """Its samples are named with `_total`."""
    family = CounterMetricFamily(name, meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(
    name: str,
    meaning: str,
    labels: Sequence[str],
    samples: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]],
) -> Metric:
    """Of histograms as `Histogram.as_dict` gives them."""
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for values, histogram in samples:
        family.add_metric(values, _buckets(histogram), histogram["sum"])
    return family


def _buckets(histogram: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Each bound with how many values are not over it, as Prometheus has it; `counts` are of each bucket."""
    bounds = map(floatToGoString, (*histogram["bounds"], math.inf))
    return list(zip(bounds, accumulate(histogram["counts"]), strict=True))
