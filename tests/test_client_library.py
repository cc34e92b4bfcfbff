"""`wicore.client`, by itself and against a service that restarts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fake_service import Service, story
from tests.services import running_worker, settings_for, start_api, stop
from tests.waiting import free_port
from wicore.client import AsyncClient, Client
from wicore.config import Settings
from wicore.errors import Cancelled, Expired, InvalidRequest, QueueFull, Unavailable, UnknownJob

ASK = {"prompt": "Once", "max_tokens": 1200, "ignore_eos": True, "seed": 1}


def in_loop(use: Callable[[AsyncClient], Any], **options: Any) -> Any:
    """What a coroutine function makes of an AsyncClient."""

    async def run() -> Any:
        async with AsyncClient(**options) as client:
            return await use(client)

    return asyncio.run(run())


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_importing_it_needs_no_server_parts() -> None:
    heavy = "{'flask', 'redis', 'numpy', 'gevent', 'celery', 'onnxruntime', 'sentencepiece'}"
    code = f"import sys, wicore.client; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- a service that restarts ----------------------------------------------------------------------


@pytest.fixture
def restartable(redis_client: Any, valkey_url: str) -> Iterator[tuple[Settings, Callable[[], None]]]:
    """Settings of a running service, and what kills its API and starts another in its place."""
    settings = settings_for(valkey_url, api__port=free_port(), engine__kind="null", engine__null_step_ms=2.0)
    apis = [start_api(settings)]

    def restart() -> None:
        apis[-1].kill()
        apis[-1].wait()
        apis.append(start_api(settings))

    with running_worker(settings):
        yield settings, restart
        stop(apis[-1])


@pytest.mark.valkey
def test_a_stream_survives_a_restart_of_the_api(
    restartable: tuple[Settings, Callable[[], None]],
) -> None:
    settings, restart = restartable
    url = f"http://127.0.0.1:{settings.api.port}"
    with Client(url) as client:
        job = client.submit(ASK)
        seen = []
        for event in job.events():
            seen.append(event)
            if len(seen) == 20:
                restart()
        assert [event["seq"] for event in seen] == list(range(1, ASK["max_tokens"] + 3))
        result = job.result()
        text = "".join(event["text"] for event in seen if event["type"] == "token")
        assert result["choices"][0]["text"] == text == "".join(job.stream())

    async def follow(client: AsyncClient) -> str:
        job = await client.submit(ASK)
        texts = []
        async for text in job.stream():
            texts.append(text)
            if len(texts) == 20:
                await asyncio.to_thread(restart)
        assert (await job.result())["choices"][0]["text"] == "".join(texts)
        return "".join(texts)

    assert in_loop(follow, url=url) == text


@pytest.mark.valkey
def test_a_batch_gives_results_in_order_and_errors_in_their_places(
    restartable: tuple[Settings, Callable[[], None]],
) -> None:
    url = f"http://127.0.0.1:{restartable[0].api.port}"
    bodies = [{"prompt": "Once", "max_tokens": n, "ignore_eos": True} for n in (9, 3, 6)]
    late = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "timeout_s": 0.05}
    with Client(url) as client:
        results = client.batch(bodies)
        assert [result["usage"]["completion_tokens"] for result in results] == [9, 3, 6]
        mixed = client.batch([bodies[0], late], return_errors=True)
        assert mixed[0]["usage"]["completion_tokens"] == 9
        assert isinstance(mixed[1], Expired)
        with pytest.raises(Expired):
            client.batch([late])
        listed = client.call("GET", "/v1/jobs")["data"]
        assert {job["priority"] for job in listed} == {"batch"}
        cancelled = client.submit(late | {"timeout_s": None})
        cancelled.cancel()
        with pytest.raises(Cancelled):
            cancelled.result()

    async def batch(client: AsyncClient) -> Any:
        return await client.batch([*bodies, late], return_errors=True)

    again = in_loop(batch, url=url)
    assert [result["usage"]["completion_tokens"] for result in again[:3]] == [9, 3, 6]
    assert isinstance(again[3], Expired)


# --- a service that misbehaves --------------------------------------------------------------------


def test_a_submit_whose_answer_is_lost_is_sent_again_as_the_same(service: Service) -> None:
    service.lost_answers = 2
    with Client(service.url) as client:
        assert client.submit(prompt="Once").id == "j1"
    assert len(service.keys) == 3
    assert len(set(service.keys)) == 1
    assert service.keys[0]
    assert len(service.submitted) == 1
    service.lost_answers = 1
    service.next_job = iter(["j2"])
    assert in_loop(lambda client: client.submit(prompt="Once"), url=service.url).id == "j2"
    assert len(set(service.keys)) == 2


def test_a_service_that_never_answers_is_unavailable(service: Service) -> None:
    service.lost_answers = 10
    with Client(service.url) as client, pytest.raises(Unavailable, match="not reachable"):
        client.submit(prompt="Once")
    assert len(service.keys) == 3


def test_a_batch_waits_while_the_queue_is_full(service: Service) -> None:
    service.stories = {"j1": story("a"), "j2": story("b")}
    service.next_job = iter(service.stories)
    service.full = 3
    with Client(service.url) as client:
        with pytest.raises(QueueFull) as caught:
            client.submit(prompt="Once")
        assert caught.value.retry_after == 0.01
        jobs = [client._submit_patiently({"prompt": text}) for text in "ab"]
    assert [job.id for job in jobs] == ["j1", "j2"]


def test_errors_are_those_of_the_service(service: Service) -> None:
    with Client(service.url) as client:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            client.submit(prompt="Once", max_tokens=0)
        with pytest.raises(UnknownJob):
            list(client.job("j9").events())
    with pytest.raises(UnknownJob):
        in_loop(lambda client: client.job("j9").cancel(), url=service.url)


def test_a_dropped_stream_goes_on_with_no_gap_and_no_repeat(service: Service) -> None:
    service.events_a_connection = 2

    async def texts(client: AsyncClient) -> list[str]:
        return [text async for text in client.job("j1").stream()]

    assert in_loop(texts, url=service.url) == ["Once ", "upon ", "a ", "time"]
    assert service.asked_after == [0, 2, 4]
    with Client(service.url) as client:
        assert list(client.job("j1").stream()) == ["Once ", "upon ", "a ", "time"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": "Once"}, "completion"),
        ({"messages": []}, "chat"),
        ({"prompt": "Once", "kind": "chat"}, "chat"),
    ],
)
def test_the_kind_of_a_job_follows_from_its_fields(
    service: Service, fields: dict[str, Any], kind: str
) -> None:
    with Client(service.url) as client:
        client.submit(**fields)
    assert service.submitted[0]["kind"] == kind


def test_the_key_is_the_argument_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WICORE_API_KEY", "of-the-environment")
    with Client() as client:
        assert client._http.headers["Authorization"] == "Bearer of-the-environment"
    with Client(api_key="mine") as client:
        assert client._http.headers["Authorization"] == "Bearer mine"
    monkeypatch.delenv("WICORE_API_KEY")
    with Client() as client:
        assert "Authorization" not in client._http.headers
