"""The page in a real browser: chat answers, the map moves, a killed rank shows and comes back, nothing in the console.

Needs Debian's chromium and the package playwright; skipped without. `make test-browser` runs it; `SCREENSHOTS=DIR` in
the environment keeps pictures of what it saw.
"""

import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from served_command import command
from serving import served_model, serving
from simulated_server import fill, simulated_server

from longspan.server.config import ServerConfig

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.processes, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
expect = playwright.expect

WAIT_MS = 60_000
FACT = "The magic number is 4711. "
QUESTION = "Once more: The magic number is "
FILLER = "".join(f"Line {i} says nothing of interest to anybody; its sum is {i * i % 97}.\n" for i in range(700))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser, url, may_say=None, **options):
    """The page of a server that runs; at the end its console must be empty but for `may_say`."""
    said = []
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 960}, **options})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: said.append(message.text) if message.text != may_say else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        page.goto(url)
        expect(page.locator("#status")).to_have_text("running", timeout=WAIT_MS)
        yield page
    finally:
        context.close()
    assert said == []


def picture(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def send(page, text):
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def map_pixels(page):
    return page.evaluate("document.getElementById('map').toDataURL()")


def test_chat_answers_the_map_moves_and_a_killed_rank_comes_back(browser, cache_home):
    options = ("--context-parallel-size", "2", "--placement", "striped", "--kv-cache-memory", "64Mi")
    with command(*options) as server, opened(browser, server.url) as page:
        empty = map_pixels(page)
        page.locator("#temperature").evaluate("field => field.value = 0")
        page.locator("#max-tokens").evaluate("field => field.value = 4")
        page.locator("#picker").set_input_files(
            {"name": "lines.txt", "mimeType": "text/plain", "buffer": (FACT + FILLER).encode()}
        )
        expect(page.locator("#files li")).to_contain_text("lines.txt")
        send(page, QUESTION)
        expect(page.locator(".turn.user")).to_contain_text("lines.txt")
        expect(page.locator(".turn.assistant .reading")).to_contain_text(re.compile(r"reading [\d,]+ of [\d,]+ tokens"))
        expect(page.locator(".turn.assistant .text")).to_have_text("4711", timeout=WAIT_MS)
        expect(page.locator(".turn.assistant .counts")).to_contain_text("4 tokens")
        expect(page.locator("#figure-kv .note")).not_to_contain_text(", 0 % cached")
        assert map_pixels(page) != empty
        expect(page.locator("#strategies .candidate.chosen").first).to_be_visible()
        picture(page, "page")

        page.locator("#max-tokens").evaluate("field => field.value = 20000")
        send(page, "Tell me " + "more " * 600)
        expect(page.locator("#requests tr")).to_have_count(1)
        expect(page.locator("#requests .phase")).to_have_text("decode", timeout=WAIT_MS)
        moving = map_pixels(page)
        os.kill(server.workers()[1], signal.SIGKILL)
        expect(page.locator("#status")).to_have_text("recovering", timeout=WAIT_MS)
        expect(page.locator("#banner")).to_contain_text("rank 1")
        picture(page, "page-recovering")
        expect(page.locator("#status")).to_have_text("running", timeout=WAIT_MS)
        expect(page.locator("#banner")).to_contain_text("All ranks are back")
        expect(page.locator("#figure-recoveries strong")).to_have_text("1")
        expect(page.locator("#requests .phase")).to_have_text(re.compile("decode"), timeout=WAIT_MS)
        assert map_pixels(page) != moving
        page.locator("#stop").click()
        expect(page.locator(".turn.assistant .counts").last).to_contain_text("stopped")
        expect(page.locator("#requests tr")).to_have_count(0)
        page.locator("#new-chat").click()
        expect(page.locator(".turn")).to_have_count(0)


def test_a_conversation_goes_on_and_is_rendered_as_text(browser):
    with serving() as server, opened(browser, server.url) as page:
        page.locator("#max-tokens").evaluate("field => field.value = 12")
        send(page, "<b>first</b>")
        expect(page.locator(".turn.assistant .counts")).to_contain_text("12 tokens")
        expect(page.locator(".turn.user")).to_have_text("<b>first</b>")
        one = int(re.search(r"(\d+) prompt", page.locator(".turn.assistant .counts").inner_text())[1])
        send(page, "second")
        expect(page.locator(".turn.assistant .counts")).to_have_count(2)
        expect(page.locator(".turn.assistant .counts").last).to_contain_text("12 tokens")
        two = int(re.search(r"(\d+) prompt", page.locator(".turn.assistant .counts").last.inner_text())[1])
        assert two > one + 12


def test_an_error_is_told_and_the_chat_goes_on(browser):
    by_chromium = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    with serving() as server, opened(browser, server.url, may_say=by_chromium) as page:
        page.locator("#max-tokens").evaluate("field => field.value = 900000")
        send(page, "too much")
        expect(page.locator(".turn .error")).to_contain_text("legal is at most")


def test_a_model_without_a_template_continues_text(browser):
    with serving(served_model(has_template=False)) as server, opened(browser, server.url) as page:
        expect(page.locator("#welcome")).to_contain_text("no chat template")
        send(page, "Once upon a time")
        expect(page.locator(".turn.assistant .counts")).to_contain_text("64 tokens")


def test_a_browser_is_asked_for_the_key(browser):
    with serving(config=ServerConfig(api_key="sesame")) as server:
        known = {"username": "me", "password": "sesame"}
        with opened(browser, server.url, http_credentials=known) as page:
            page.locator("#max-tokens").evaluate("field => field.value = 3")
            send(page, "a")
            expect(page.locator(".turn.assistant .counts")).to_contain_text("3 tokens")
        context = browser.new_context(http_credentials={"username": "me", "password": "wrong"})
        assert context.new_page().goto(server.url).status == 401
        context.close()


def test_the_map_is_walked_by_keyboard_and_says_what_it_is_at(browser):
    with serving(context_parallel_size=2) as server, opened(browser, server.url) as page:
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tip")).to_be_visible()
        expect(page.locator("#map-said")).to_contain_text("rank 0, ")
        page.keyboard.press("Escape")
        expect(page.locator("#tip")).to_be_hidden()
        page.locator("#message").focus()
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.id") != "message"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, scheme):
    with simulated_server(4, step_s=0.05, kv_cache_memory=2**22) as server:
        fill(server, [300, 5000, 700, 30, 2000], 3000)
        phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
        with opened(browser, server.url, color_scheme=scheme, **phone) as page:
            expect(page.locator("#requests tr")).to_have_count(5)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 384) == (scheme == "light")
            time.sleep(1)
            picture(page, f"page-phone-{scheme}")


def test_it_shows_128_ranks_and_a_thousand_requests(browser):
    lens = [*[30, 300, 700] * 331, 6000, 20_000, 20_000, 30_000, 30_000, 40_000, 40_000]
    with simulated_server(128, step_s=0.05) as server:
        fill(server, lens, 4000)
        with opened(browser, server.url) as page:
            expect(page.locator("#requests tr")).to_have_count(200)
            expect(page.locator("#requests-note")).to_contain_text("800 not shown")
            expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("128 ranks"))
            page.locator("details.ranks summary").click()
            expect(page.locator("#ranks tr")).to_have_count(128)
            page.locator("details.ranks summary").click()
            before = map_pixels(page)
            page.wait_for_function("before => document.getElementById('map').toDataURL() !== before", arg=before)
            picture(page, "page-128-ranks")
