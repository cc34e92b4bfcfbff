"""What a worker counts of what it serves, with times of our own."""

from __future__ import annotations

from typing import Any

from wicore.telemetry.serving import Rate, ServingStats, Times, token_bounds


def histogram(stats: ServingStats, name: str) -> tuple[int, float]:
    """Count and sum."""
    found: Any = stats.report(0.0)["latency"][name]
    return sum(found["counts"]), round(found["sum"], 6)


def test_the_stages_of_a_request_add_up_to_its_whole() -> None:
    stats = ServingStats(4096)
    times = Times(popped=10.0, queued_s=2.0, scheduled=10.5, first_token=11.5, last_token=14.5)
    stats.started(times, 7)
    stats.ended(times, "stop", 7, 4, at=14.75)
    assert histogram(stats, "time_to_first_token") == (1, 3.5)
    assert histogram(stats, "request_queue_time") == (1, 2.5)
    assert histogram(stats, "request_prefill_time") == (1, 1.0)
    assert histogram(stats, "request_decode_time") == (1, 3.0)
    assert histogram(stats, "request_inference_time") == (1, 4.0)
    assert histogram(stats, "request_time_per_output_token") == (1, 1.0)
    assert histogram(stats, "e2e_request_latency") == (1, 6.75)
    requests: Any = stats.report(15.0)["requests"]
    assert requests["finished"] == {"stop": 1}
    assert (requests["prompt_tokens"], requests["request_generation_tokens"]["sum"]) == (7, 4)


def test_stages_that_were_not_reached_do_not_count() -> None:
    stats = ServingStats(4096)
    stats.ended(Times(popped=1.0, queued_s=0.5), "cancelled", 7, 0, at=2.0)
    assert histogram(stats, "e2e_request_latency") == (1, 1.5)
    assert histogram(stats, "request_queue_time") == (0, 0)
    stats.ended(Times(popped=1.0, queued_s=0.5, scheduled=1.5), "expired", 7, 0, at=2.0)
    assert histogram(stats, "request_queue_time") == (1, 1.0)
    assert histogram(stats, "request_prefill_time") == (0, 0)


def test_the_first_token_of_a_later_attempt_is_not_the_requests_first() -> None:
    stats = ServingStats(4096)
    stats.started(Times(popped=1.0, queued_s=9.0, resumes=True, first_token=2.0), 7)
    assert histogram(stats, "time_to_first_token") == (0, 0)


def test_time_between_tokens_is_counted_for_each_sequence_that_had_one_before() -> None:
    stats = ServingStats(4096)
    stats.step([1, 2], 9, at=1.0)
    assert histogram(stats, "inter_token_latency") == (0, 0)
    stats.step([1, 2, 3], 3, at=1.5)
    assert histogram(stats, "inter_token_latency") == (2, 1.0)
    stats.step([1], 1, at=2.0)
    stats.step([1, 2, 3], 3, at=2.25)  # 2 and 3 were held up for a step
    assert histogram(stats, "inter_token_latency") == (6, 1.0 + 0.5 + 0.25 + 0.75 + 0.75)
    requests: Any = stats.report(3.0)["requests"]
    assert requests["generation_tokens"] == 9
    assert requests["iteration_tokens"]["sum"] == 16


def test_a_sequence_that_is_gone_is_forgotten_with_its_last_step() -> None:
    stats = ServingStats(4096)
    stats.step([1], 1, at=1.0)
    stats.gone(1)
    stats.step([1], 1, at=2.0)
    assert histogram(stats, "inter_token_latency") == (1, 1.0)
    stats.step([1], 1, at=9.0)  # another that got its key
    assert histogram(stats, "inter_token_latency") == (1, 1.0)


def test_a_rate_looks_back_ten_seconds_and_falls_when_nothing_comes() -> None:
    rate = Rate()
    assert rate.a_second((5,), 0.0) == [0.0]
    for second in range(30):
        rate.see((100 * second,), float(second))
    assert rate.a_second((2900,), 29.0) == [100.0]
    assert rate.a_second((2900,), 129.0) == [0.0]


def test_bounds_of_token_counts_end_at_the_context() -> None:
    assert token_bounds(100) == [1, 2, 5, 10, 20, 50, 100]
    assert token_bounds(4096)[-1] == 2000
