"""The playground in a real browser: what is asked, streamed, and not lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.conftest import KEY, Service
from tests.images import data_url, image_part, png

pytestmark = [pytest.mark.browser, pytest.mark.valkey]

Open = Callable[..., Any]


@pytest.fixture
def page(service: Service, open_page: Open) -> Any:
    return open_page(service.url)


def ask(page: Any, *, max_tokens: int, prompt: str = "Once upon a time") -> None:
    """Have a text continued."""
    page.get_by_role("button", name="Completion", exact=True).click()
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Continue text").click()


def answer(page: Any) -> Any:
    return page.locator("[data-testid=answer]:visible").last


def text_of(page: Any) -> str:
    return str(answer(page).evaluate("element => element.textContent"))


def wait_for_text(page: Any, more_than: int = 0) -> None:
    page.wait_for_function(
        "least => [...document.querySelectorAll('[data-testid=answer]')]"
        ".some(element => element.textContent.length > least)",
        arg=more_than,
    )


def wait_for_end(page: Any, status: str = "done") -> str:
    """The job's id, once the answer is shown as ended."""
    page.wait_for_selector(f"article.answer:last-child[data-status={status}]:visible", timeout=60_000)
    return str(page.locator("article.answer:visible [data-job]").last.get_attribute("data-job"))


def result(service: Service, job: str) -> str:
    record = service.record(job)
    assert record["status"] == "succeeded"
    choice = record["result"]["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def test_a_text_is_continued_as_it_is_made(service: Service, page: Any) -> None:
    ask(page, max_tokens=150)
    wait_for_text(page)
    assert page.locator("article.answer").get_attribute("data-status") == "running"
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)
    assert re.search(r"150 tokens · \d+ tok/s · first after .*s", page.locator(".figures").inner_text())


def test_a_chat_keeps_its_turns_and_can_ask_again_and_edit(service: Service, page: Any) -> None:
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("Max tokens").fill("5")
    for turn in ("Hello", "And more"):
        page.get_by_label("Message", exact=True).fill(turn)
        page.keyboard.press("Enter")
        page.get_by_role("article", name="You").filter(has_text=turn).wait_for()
        job = wait_for_end(page)
        assert text_of(page) == result(service, job)
    assert service.record(job)["prompt_tokens"] > 20
    page.get_by_role("button", name="Ask again").last.click()
    page.wait_for_function(
        "old => document.querySelector('article.answer:last-child [data-job]')?.dataset.job !== old", arg=job
    )
    wait_for_end(page)
    assert page.locator("article.answer").count() == 2
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("Something else")
    page.keyboard.press("Enter")
    page.get_by_role("article", name="You").filter(has_text="Something else").wait_for()
    assert page.locator("article.answer").count() == 1


def test_stop_cancels_the_job(service: Service, page: Any) -> None:
    ask(page, max_tokens=3000)
    wait_for_text(page)
    page.get_by_role("button", name="Stop").click()
    job = wait_for_end(page, "cancelled")
    assert service.record(job)["status"] == "cancelled"


def test_a_reload_in_mid_stream_goes_on_where_it_was(service: Service, page: Any) -> None:
    ask(page, max_tokens=400)
    wait_for_text(page, more_than=200)
    before = text_of(page)
    page.reload()
    wait_for_text(page)
    assert text_of(page).startswith(before[:100])
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)


def test_an_api_that_dies_in_mid_stream_costs_neither_a_token_nor_an_answer(
    service: Service, page: Any
) -> None:
    ask(page, max_tokens=600)
    wait_for_text(page, more_than=200)
    service.kill_api()
    page.get_by_text("Connection lost").wait_for()
    seen = text_of(page)
    service.start_api()
    job = wait_for_end(page)
    assert text_of(page).startswith(seen)
    assert text_of(page) == result(service, job)
    assert page.get_by_text("Connection lost").count() == 0


def test_a_lost_network_costs_nothing_either(service: Service, page: Any) -> None:
    ask(page, max_tokens=400)
    wait_for_text(page, more_than=100)
    page.context.set_offline(True)
    page.get_by_text("Connection lost").wait_for()
    page.context.set_offline(False)
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)


def test_a_submit_that_finds_no_network_makes_one_job_when_it_is_back(service: Service, page: Any) -> None:
    page.context.set_offline(True)
    ask(page, max_tokens=5, prompt="Nobody hears")
    page.get_by_text("Trying again").wait_for()
    page.context.set_offline(False)
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)


def test_what_the_api_refuses_is_said_and_the_field_is_marked(page: Any) -> None:
    page.get_by_label("Temperature", exact=True).fill("3")
    ask(page, max_tokens=5)
    problem = page.locator("article.answer[data-status=failed] .problem")
    problem.wait_for()
    assert "temperature" in problem.inner_text()
    assert page.get_by_label("Temperature", exact=True).get_attribute("aria-invalid") == "true"


def test_tokens_are_coloured_and_their_alternatives_reached_by_keys(service: Service, page: Any) -> None:
    page.get_by_label("Colour by probability").check()
    ask(page, max_tokens=12)
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)
    tokens = page.locator(".token")
    tokens.first.focus()
    tip = page.get_by_role("tooltip")
    assert "100.0%" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("token => token === document.activeElement")
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def see(page: Any, service: Service, **limits: int) -> Any:
    """Have the page think that images are limited so; the button that attaches them."""
    model = service.http.get("/v1/models").json()
    assert model["data"][0]["input_modalities"] == ["text", "image"]
    model["data"][0]["image_limits"] = limits or None
    page.route("**/v1/models", lambda route: route.fulfill(json=model))
    page.reload()
    page.get_by_role("button", name="Chat", exact=True).click()
    attach = page.get_by_role("button", name="Attach images")
    attach.wait_for()
    return attach


def file(name: str, data: bytes, kind: str = "image/png") -> Any:
    return {"name": name, "mimeType": kind, "buffer": data}


def test_images_are_offered_only_for_a_model_that_takes_them(service: Service, open_page: Open) -> None:
    page = open_page(service.url)
    see(page, service)
    page.unroute("**/v1/models")
    model = service.http.get("/v1/models").json()
    model["data"][0] |= {"input_modalities": ["text"], "image_limits": None}
    page.route("**/v1/models", lambda route: route.fulfill(json=model))
    page.reload()
    page.get_by_role("button", name="Chat", exact=True).click()
    assert page.get_by_role("button", name="Attach images").count() == 0


def test_images_are_shown_removed_and_sent_with_the_message(service: Service, page: Any) -> None:
    see(page, service, images=3, bytes=5000)
    chosen = page.locator("input[type=file]")
    red, blue = png(seed=1), png(seed=2)
    chosen.set_input_files([file("red.png", red), file("blue.png", blue)])
    page.get_by_role("img", name="Image 2").wait_for()
    page.get_by_role("button", name="Remove image 1").click()
    page.get_by_role("img", name="Image 2").wait_for(state="detached")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Message", exact=True).fill("What is this?")
    with page.expect_request("**/v1/jobs") as sent:
        page.keyboard.press("Enter")
    (message,) = sent.value.post_data_json["messages"]
    assert message["content"] == [image_part(blue), {"type": "text", "text": "What is this?"}]
    question = page.get_by_role("article", name="You")
    assert question.get_by_role("img", name="Attached image").count() == 1
    job = wait_for_end(page)
    assert text_of(page) == result(service, job)
    # An image takes four tokens, between two, and blank lines.
    assert service.record(job)["prompt_tokens"] > 20


def test_what_cannot_be_attached_is_said(service: Service, page: Any) -> None:
    see(page, service, images=2, bytes=5000)
    chosen = page.locator("input[type=file]")
    problem = page.locator(".composer [role=alert]")
    chosen.set_input_files(
        [file("large.png", png() + bytes(5000)), file("a.svg", b"<svg/>", "image/svg+xml")]
    )
    problem.wait_for()
    assert "large.png has 5.1 KB; an image may have 5.0 KB." in problem.inner_text()
    assert "a.svg is no PNG, JPEG, WebP, GIF or BMP." in problem.inner_text()
    chosen.set_input_files([file(f"{i}.png", png()) for i in range(3)])
    page.get_by_role("img", name="Image 2").wait_for()
    assert problem.inner_text() == "A conversation may have 2 images."
    page.get_by_role("button", name="Remove image 2").click()
    assert not problem.is_visible()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_may_be_dropped_or_pasted(service: Service, page: Any, way: str) -> None:
    see(page, service, images=2, bytes=5000)
    page.evaluate(
        """([way, data]) => {
          const files = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
          files.items.add(new File([bytes], "a.png", { type: "image/png" }));
          const options = { bubbles: true, cancelable: true };
          const event = way === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: files })
            : new ClipboardEvent("paste", { ...options, clipboardData: files });
          document.querySelector("#chat-input").dispatchEvent(event);
        }""",
        [way, data_url(png()).partition(",")[2]],
    )
    assert page.get_by_role("img", name="Image 1").get_attribute("src") == data_url(png())


def test_a_service_with_keys_asks_for_one_and_streams_with_it(locked: str, open_page: Open) -> None:
    page = open_page(locked)
    page.get_by_role("dialog", name="API key").wait_for()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    ask(page, max_tokens=20)
    wait_for_end(page)
    assert text_of(page)
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_letters_are_shortcuts_but_not_while_writing(service: Service, page: Any) -> None:
    page.keyboard.press("d")
    page.wait_for_url("**/#dashboard")
    page.keyboard.press("/")
    page.wait_for_url("**/#playground")
    page.keyboard.type("d?")
    assert page.url.endswith("#playground")
    page.locator("#main").focus()
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keyboard").wait_for()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
