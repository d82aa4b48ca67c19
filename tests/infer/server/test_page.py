"""The page at / in Chromium: a person types and watches tokens, speed and memory."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_core import FakeCore

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Skipped where there is none, but never in CI."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium or google-chrome on this machine; CI needs one to open the page")
        pytest.skip("no chromium or google-chrome on this machine")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    yield page
    context.close()


def test_a_person_watches_tokens_speed_and_memory(serve: Callable[..., Any], tab: Any) -> None:
    steps = threading.Semaphore(3)
    live = serve(FakeCore(steps))
    tab.goto(live.url)
    expect(tab.locator("#about")).to_contain_text("fake")
    tab.get_by_label("Text to continue").fill("<b>x</b>")
    tab.get_by_label("Tokens at most").fill("6")
    tab.get_by_role("button", name="Write").click()
    # the rest is not let yet: what is seen has come by the stream
    expect(tab.locator("#written")).to_have_text("<b>")
    assert tab.get_by_role("button", name="Write").is_disabled()
    expect(tab.locator("#memory")).to_have_text("10 B of 1000 B")
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "1")
    expect(tab.locator("#text")).to_have_attribute("aria-busy", "true")
    steps.release(50)
    expect(tab.locator("#said")).to_have_text("Done.")
    assert tab.inner_text("#text") == "<b>x</b><b>x</"
    assert tab.inner_text("#count") == "6"
    assert tab.inner_text("#cached") == "3 of 8"
    assert float(tab.inner_text("#speed")) > 0
    assert re.fullmatch(r"\d+ ms", tab.inner_text("#first"))
    # a line of the speeds between the pieces
    assert tab.locator("#course path").get_attribute("d").count("L") == 4
    expect(tab.get_by_role("meter")).to_have_attribute("aria-valuenow", "0")
    assert tab.trouble == []


def test_stop_frees_the_place(serve: Callable[..., Any], tab: Any) -> None:
    core = FakeCore(threading.Semaphore(2))
    live = serve(core)
    tab.goto(live.url)
    tab.get_by_role("button", name="Write").click()
    expect(tab.locator("#written")).to_have_text("Th")
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator("#said")).to_have_text("Stopped.")
    while live.service.loop.live:
        pass
    assert core.live == []
    assert tab.get_by_role("button", name="Write").is_enabled()


def test_keys_write_and_stop(serve: Callable[..., Any], tab: Any) -> None:
    core = FakeCore(threading.Semaphore(2))
    live = serve(core)
    tab.goto(live.url)
    tab.keyboard.press("End")
    tab.keyboard.press("Control+Enter")
    expect(tab.locator("#written")).to_have_text("Th")
    tab.keyboard.press("Escape")
    expect(tab.locator("#said")).to_have_text("Stopped.")
    # what can be reached by Tab, in this order
    names = []
    for _ in range(6):
        names.append(tab.evaluate("document.activeElement.id"))
        tab.keyboard.press("Tab")
    assert names == ["prompt", "kind", "tokens", "temperature", "mass", "go"]


def test_what_goes_wrong_is_shown(serve: Callable[..., Any], tab: Any) -> None:
    live = serve(FakeCore(threading.Semaphore(2)), timeout=0.5)
    tab.goto(live.url)
    expect(tab.locator("#about")).to_contain_text("fake")
    shown = tab.get_by_role("alert")
    tab.get_by_label("Text to continue").fill("a" * 150)
    tab.get_by_role("button", name="Write").click()
    expect(shown).to_contain_text("the context is 200 tokens")
    tab.get_by_label("Text to continue").fill("ab")
    tab.get_by_role("button", name="Write").click()
    expect(tab.locator("#written")).to_have_text("ab")
    expect(shown).to_contain_text("took too long")
    # a stream that is cut off is not taken for a whole one, and an answer that is no JSON is told too
    for answer, words in (({"status": 200, "body": "data: {\"choices\":[{\"text\":\"x\"}]}\n\n"}, "connection ended"),
                          ({"status": 502, "body": "<html>"}, "status 502")):
        tab.route("**/v1/completions", lambda route, _, answer=answer: route.fulfill(**answer))
        tab.get_by_role("button", name="Write").click()
        expect(shown).to_contain_text(words)
        tab.unroute("**/v1/completions")
    tab.route("**/v1/completions", lambda route: route.abort())
    tab.get_by_role("button", name="Write").click()
    expect(shown).to_contain_text("cannot be reached")
    expect(tab.get_by_role("button", name="Write")).to_be_enabled()


def test_a_message_is_answered_with_the_key_that_the_page_asks_for(serve: Callable[..., Any], tab: Any) -> None:
    live = serve(keys=("secret",))
    tab.goto(live.url)
    tab.get_by_label("What it is").select_option("chat")
    tab.get_by_label("Text to continue").fill("Hi")
    tab.get_by_label("Tokens at most").fill("5")
    tab.get_by_label("Text to continue").press("Control+Enter")
    tab.wait_for_selector("#trouble:not([hidden])")
    assert "API key" in tab.inner_text("#trouble")
    tab.get_by_label("API key").fill("secret")
    tab.get_by_role("button", name="Write").click()
    expect(tab.locator("#said")).to_have_text("Done.")
    assert tab.inner_text("#text") == "User:"
    assert tab.locator("#trouble").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_the_page_fits_and_can_be_read(serve: Callable[..., Any], browser: Any, scheme: str, width: int) -> None:
    live = serve()
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(live.url)
    expect(tab.locator("#about")).to_contain_text("fake")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper, soft = tab.evaluate(
        "[['body', 'color'], ['body', 'backgroundColor'], ['label', 'color']]"
        ".map(([s, key]) => getComputedStyle(document.querySelector(s))[key])")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    assert contrast(ink, paper) > 7
    assert contrast(soft, paper) > 4.5
    edge, card = tab.evaluate(
        "(s => [s.borderTopColor, s.backgroundColor])(getComputedStyle(document.querySelector('input')))")
    assert contrast(edge, card) > 3
    assert contrast(edge, paper) > 3
    fields = "[...document.querySelectorAll('input, select, textarea')]"
    assert tab.evaluate(fields + ".filter(field => !field.labels.length).length") == 0
    assert all(url.startswith((live.url, "data:")) for url in requests)
    context.close()


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG has it."""
    channels = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
