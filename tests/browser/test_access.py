"""The page for everybody: no serious finding of axe, in both themes; no scrolling sideways on a phone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.conftest import Service

pytestmark = [pytest.mark.browser, pytest.mark.valkey]

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


def show(page: Any, view: str) -> None:
    """The view with something in it."""
    if view == "dashboard":
        page.locator(".workers-card tbody tr").wait_for()
        page.locator(".sequence").first.wait_for()
        return
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("Max tokens").evaluate(
        "input => { input.value = 20; input.dispatchEvent(new Event('input')) }"
    )
    page.get_by_label("Colour by probability").evaluate("input => input.click()")
    page.get_by_label("Message", exact=True).fill("How long is a " + "very " * 40 + "long_" * 40 + "word?")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("article.answer[data-status=done]")


def serious(page: Any) -> list[str]:
    """What axe, which is in the page, finds there that keeps people out."""
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{one['id']}: {node['html']}: {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.fixture
def busy(service: Service) -> Any:
    job = service.submit(max_tokens=3000)
    yield
    service.http.delete(f"/v1/jobs/{job}")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["playground", "dashboard"])
def test_axe_finds_nothing_serious(
    service: Service, busy: None, open_page: Callable[..., Any], axe: str, view: str, theme: str
) -> None:
    page = open_page(f"{service.url}#{view}", color_scheme=theme, bypass_csp=True)
    show(page, view)
    page.evaluate(axe)
    assert serious(page) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_has_ended_or_is_out_of_date_is_legible(
    service: Service, busy: None, open_page: Callable[..., Any], axe: str, theme: str
) -> None:
    page = open_page(f"{service.url}#dashboard", color_scheme=theme, bypass_csp=True)
    show(page, "dashboard")
    # The page does nothing later any more, so that axe, whose own pauses are short, sees this state whole.
    page.evaluate(
        """() => {
          const soon = window.setTimeout;
          window.setTimeout = (work, ms = 0) => (ms < 500 ? soon(work, ms) : 0);
          document.querySelector(".grid").dataset.state = "stale";
          document.querySelector(".sequence").classList.add("ended");
        }"""
    )
    page.evaluate(axe)
    assert serious(page) == []


@pytest.mark.parametrize("view", ["playground", "dashboard"])
def test_nothing_scrolls_sideways_on_a_phone(
    service: Service, busy: None, open_page: Callable[..., Any], view: str
) -> None:
    page = open_page(f"{service.url}#{view}", **PHONE)
    show(page, view)
    wide = page.evaluate(
        "() => [document.documentElement, document.querySelector('main')]"
        ".map(element => element.scrollWidth - innerWidth)"
    )
    assert max(wide) <= 0


def test_the_theme_can_be_chosen_and_stays(service: Service, open_page: Callable[..., Any]) -> None:
    page = open_page(service.url, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button = page.locator("#theme-button")
    button.click()
    button.click()
    assert button.get_attribute("aria-label") == "Theme: dark"
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
