"""The commands that talk to a service, against a small server that misbehaves on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from tests.fake_service import Door, Event, Service, story
from tests.images import data_url, image_part, png
from wicore.cli import main
from wicore.client import Client
from wicore.client.wire import EventReader
from wicore.errors import Unavailable, UnknownJob
from wicore.exit_codes import ExitCode


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def wicore(service: Service) -> Callable[..., Any]:
    def run(*arguments: str, **options: Any) -> Any:
        return CliRunner().invoke(main, [arguments[0], "--url", service.url, *arguments[1:]], **options)

    return run


def test_watch_prints_the_text_and_ends_with_the_job(wicore: Callable[..., Any]) -> None:
    result = wicore("watch", "j1")
    assert (result.exit_code, result.output) == (ExitCode.OK, "Once upon a time\n")


def test_watch_from_a_number_starts_there(wicore: Callable[..., Any]) -> None:
    assert wicore("watch", "j1", "--from", "4").output == "a time\n"


def test_watch_from_after_the_end_prints_nothing_and_ends(wicore: Callable[..., Any]) -> None:
    result = wicore("watch", "j1", "--from", "100")
    assert (result.exit_code, result.output) == (ExitCode.OK, "")


def test_a_dropped_stream_goes_on_with_no_gap_and_no_repeat(
    service: Service, wicore: Callable[..., Any]
) -> None:
    service.events_a_connection = 2
    assert wicore("watch", "j1").output == "Once upon a time\n"
    assert service.asked_after == [0, 2, 4]


def test_a_service_that_is_away_for_a_moment_is_asked_again(
    service: Service, wicore: Callable[..., Any]
) -> None:
    service.refusals = 2
    assert wicore("watch", "j1").output == "Once upon a time\n"


def test_a_stream_without_progress_is_given_up_and_says_how_to_go_on(service: Service) -> None:
    service.refusals = 10**6
    with Client(service.url, patience_s=0.3) as client, pytest.raises(Unavailable) as caught:
        list(client.job("j1").events())
    assert "wicore watch j1 --from 1" in caught.value.message


def test_an_unknown_job_is_an_error_at_once(service: Service, wicore: Callable[..., Any]) -> None:
    with Client(service.url) as client, pytest.raises(UnknownJob):
        list(client.job("j9").events())
    result = wicore("cancel", "j9")
    assert (result.exit_code, result.output) == (ExitCode.REFUSED, "error: no job j9\n")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ({"type": "failed", "error": {"message": "it broke", "code": "worker_lost"}}, "it broke"),
        ({"type": "cancelled"}, "the job was cancelled"),
        ({"type": "expired"}, "the job's deadline passed"),
    ],
)
def test_a_job_that_did_not_end_well_is_a_failure(
    service: Service, wicore: Callable[..., Any], end: Event, message: str
) -> None:
    service.stories["j1"] = story("Once", end=end)
    result = wicore("watch", "j1")
    assert result.exit_code == ExitCode.FAILED
    assert result.stdout == "Once\n"
    assert message in result.stderr


def test_further_choices_follow_the_first(service: Service, wicore: Callable[..., Any]) -> None:
    service.stories["j1"] = [
        {"seq": 1, "type": "token", "index": 1, "text": "other"},
        {"seq": 2, "type": "token", "index": 0, "text": "first"},
        {"seq": 3, "type": "done"},
    ]
    assert wicore("watch", "j1").output == "first\n--- choice 1 ---\nother\n"


def test_submit_prints_the_id_and_sends_only_what_was_given(
    service: Service, wicore: Callable[..., Any]
) -> None:
    result = wicore("submit", "Hello", "--temperature", "0", "--stop", ".", "--priority", "batch")
    assert (result.exit_code, result.stdout) == (ExitCode.OK, "j1\n")
    assert service.submitted == [
        {"kind": "completion", "prompt": "Hello", "temperature": 0.0, "stop": ["."], "priority": "batch"}
    ]


def test_submit_and_wait_prints_the_text_alone(wicore: Callable[..., Any]) -> None:
    result = wicore("submit", "Hello", "--wait")
    assert (result.stdout, result.stderr) == ("Once upon a time\n", "j1\n")


def test_submit_chat_reads_standard_input(service: Service, wicore: Callable[..., Any]) -> None:
    wicore("submit", "--system", "Be brief.", "-", input="What is it?")
    assert service.submitted[0]["kind"] == "chat"
    assert [message["content"] for message in service.submitted[0]["messages"]] == [
        "Be brief.",
        "What is it?",
    ]


def test_a_refused_request_is_one_line_and_its_exit_code(wicore: Callable[..., Any]) -> None:
    result = wicore("submit", "Hello", "--max-tokens", "0")
    assert (result.exit_code, result.stderr) == (
        ExitCode.REFUSED,
        "error: max_tokens: must be at least 1 (got 0)\n",
    )


def test_cancel_says_what_became_of_the_job(wicore: Callable[..., Any]) -> None:
    assert wicore("cancel", "j1").output == "j1 is being cancelled\n"


def test_chat_sends_the_conversation_so_far(service: Service, wicore: Callable[..., Any]) -> None:
    service.stories = {"j1": story("Hi", "!"), "j2": story("Fine."), "j3": story("Yes.")}
    service.next_job = iter(service.stories)
    result = wicore("chat", "--system", "Be kind.", input="Hello\nHow are you?\n/reset\nNew?\n/quit\nnever\n")
    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines() == ["Hi!", "Fine.", "The conversation starts anew.", "Yes."]
    said = [[message["content"] for message in body["messages"]] for body in service.submitted]
    assert said == [
        ["Be kind.", "Hello"],
        ["Be kind.", "Hello", "Hi!", "How are you?"],
        ["Be kind.", "New?"],
    ]


def test_a_chat_shows_images_with_the_next_question(
    service: Service, wicore: Callable[..., Any], tmp_path: Any
) -> None:
    service.stories = {"j1": story("A cat."), "j2": story("Still.")}
    service.next_job = iter(service.stories)
    path = tmp_path / "cat.png"
    path.write_bytes(png())
    said = f"/image {tmp_path}/dog.png\n/image {path}\nWhat is this?\nAnd now?\n"
    result = wicore("chat", input=said)
    assert "dog.png: No such file or directory" in result.output
    first, second = (body["messages"] for body in service.submitted)
    assert first == [{"role": "user", "content": [image_part(), {"type": "text", "text": "What is this?"}]}]
    assert second[:2] == [*first, {"role": "assistant", "content": "A cat."}]
    assert second[2] == {"role": "user", "content": "And now?"}


def test_submit_shows_images_before_the_prompt(
    service: Service, wicore: Callable[..., Any], tmp_path: Any
) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(png())
    assert wicore("submit", "--image", str(path), "What?").exit_code == ExitCode.OK
    (message,) = service.submitted[0]["messages"]
    url = data_url(png(), "jpeg")
    shown = {"type": "image_url", "image_url": {"url": url}}
    assert message["content"] == [shown, {"type": "text", "text": "What?"}]
    assert wicore("submit", "--image", str(tmp_path / "none.jpg"), "What?").exit_code != ExitCode.OK


def test_a_failed_answer_does_not_end_the_chat(service: Service, wicore: Callable[..., Any]) -> None:
    failed = {"type": "failed", "error": {"message": "too long", "code": "too_large"}}
    service.stories = {"j1": [{"seq": 1, **failed}], "j2": story("Fine.")}
    service.next_job = iter(service.stories)
    result = wicore("chat", input="Long\nShort\n")
    assert result.exit_code == ExitCode.OK
    assert "error: too long" in result.stderr
    assert [message["content"] for message in service.submitted[1]["messages"]] == ["Short"]


def test_a_service_that_is_not_there_is_an_error_with_the_fix(service: Service) -> None:
    service.server_close()
    result = CliRunner().invoke(main, ["submit", "--url", service.url, "Hello"])
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert "wicore up" in result.stderr
    assert "--url" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_not_wicore_is_told_apart(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Door, "do_POST", lambda door: door.send_error(502))
    result = CliRunner().invoke(main, ["submit", "--url", service.url, "Hello"])
    assert "not from WiCore" in result.stderr


def test_event_streams_are_read_as_the_standard_says() -> None:
    lines = [": hello", "", "id: 1", "data: a", "data:b", "", "event: x", "", "data: cut off"]
    reader = EventReader()
    assert [data for line in lines if (data := reader.feed(line)) is not None] == ["a\nb"]
