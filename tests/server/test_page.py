"""Drive the page in a browser: a memory is made and filled, a question asked, a word chosen, its passage read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.langchain.conftest import ScriptedEngine, tiny_engine
from tests.server.conftest import Running, fill, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser of the system: apt install chromium"),
]
NASTY = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_engine(ScriptedEngine), tmp_path_factory.mktemp("page")) as made:
        fill(made, "nasty", {f"{NASTY}.html": f"{NASTY} the cat 🐈 sat on the mat. " * 4})
        fill(made, "other", {"other.txt": "a dog 🐕 ran in the park. " * 4})
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield made
        made.close()


def _is_fault(message: Any) -> bool:
    return message.type == "error" and "Failed to load resource" not in message.text  # a refused request is no fault


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    context = browser.new_context()
    made = context.new_page()
    faults: list[str] = []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on("console", lambda message: faults.append(message.text) if _is_fault(message) else None)
    foreign: list[str] = []
    made.on("request", lambda request: foreign.append(request.url) if running.url not in request.url else None)
    made.goto(running.url)
    sync_api.expect(made.locator("#model")).to_have_text(running.model)
    yield made
    assert faults == []
    assert foreign == []  # nothing is fetched from outside
    context.close()


def test_from_nothing_to_the_passage(page: Any, tmp_path: Path) -> None:
    page.get_by_label("New memory").fill("mine")
    page.get_by_role("button", name="Create").click()
    sync_api.expect(page.locator("#memory")).to_have_value("mine")
    note = tmp_path / "note.txt"
    note.write_text("Ada Miller signed the lease of the mill. 🖋 " * 3, encoding="utf-8")
    page.locator("#files").set_input_files(note)
    sync_api.expect(page.locator("#document-count")).to_have_text("1")
    page.get_by_label("Ask about the memory").fill("who signed")
    page.keyboard.press("Control+Enter")
    words = page.locator("#answer button")
    sync_api.expect(words.first).to_be_visible()
    assert page.locator("#map tbody tr").count() >= 1
    assert page.locator("#map thead th").count() == words.count()
    words.first.click()
    sync_api.expect(page.locator("#passage mark")).to_contain_text("Ada Miller signed the lease")
    sync_api.expect(page.locator("#passage-source")).to_contain_text("note.txt, characters 0 to")


def test_what_is_hidden_is_not_seen(page: Any) -> None:
    for name in ("#key-form", "#indexing", "#map-section", "#passage-section", "#supported"):
        sync_api.expect(page.locator(name)).to_be_hidden()


def test_the_map_is_walked_by_keys(page: Any) -> None:
    page.locator("#memory").select_option("nasty")
    page.get_by_label("Ask about the memory").fill("who sat")
    page.get_by_role("button", name="Ask").click()
    cells = page.locator("#map tbody button")
    sync_api.expect(cells.first).to_be_visible()
    assert [cells.nth(at).get_attribute("tabindex") for at in range(2)] == ["0", "-1"]
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    assert cells.nth(1).evaluate("cell => cell === document.activeElement")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#passage")).to_contain_text("the cat 🐈 sat")


def test_markup_in_documents_and_names_stays_text(page: Any) -> None:
    page.locator("#memory").select_option("nasty")
    page.locator("summary").click()
    sync_api.expect(page.locator("#documents")).to_contain_text("<script>document.title=2</script>")
    page.get_by_label("Ask about the memory").fill(NASTY)
    page.get_by_role("button", name="Ask").click()
    sync_api.expect(page.locator("#answer button").first).to_be_visible()
    page.locator("#answer button").first.click()
    sync_api.expect(page.locator("#passage")).to_contain_text("<script>document.title=2</script>")
    assert page.title() == "focusllm"
    assert page.locator("main img, main script").count() == 0


def test_what_comes_late_belongs_to_the_memory_it_was_asked_of(page: Any) -> None:
    """Another memory is chosen while documents are listed, and after an answer: neither is taken for the other's."""
    sync_api.expect(page.locator("#documents li")).not_to_have_count(0)
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    page.route("**/v1/memories/other/documents", hold)
    with page.expect_request("**/v1/memories/other/documents"):
        page.locator("#memory").select_option("other")
    page.locator("#memory").select_option("nasty")
    sync_api.expect(page.locator("#documents")).to_contain_text("title=2")
    with page.expect_response("**/v1/memories/other/documents"):
        held[0].continue_()
    page.unroute("**/v1/memories/other/documents", hold)
    page.get_by_label("Ask about the memory").fill("who sat")
    page.get_by_role("button", name="Ask").click()
    cells = page.locator("#map tbody button")
    sync_api.expect(cells.first).to_be_visible()
    sync_api.expect(page.locator("#documents")).to_contain_text("title=2")
    page.locator("#memory").select_option("other")
    sync_api.expect(page.locator("#documents")).to_contain_text("other.txt")
    cells.first.click()
    sync_api.expect(page.locator("#passage")).to_contain_text("the cat 🐈 sat")


def test_every_control_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, progress, pre")].filter((one) =>
          !(one.labels && one.labels.length) && !one.getAttribute("aria-label") && !one.getAttribute("aria-labelledby")
          && !one.textContent.trim()).map((one) => one.id)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_and_dark(browser: Any, running: Running, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(running.url)
    red = page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red > 128) == (scheme == "light")
    context.close()


def test_an_error_is_said_and_the_page_goes_on(page: Any) -> None:
    page.get_by_label("New memory").fill("nasty")
    page.get_by_role("button", name="Create").click()
    sync_api.expect(page.locator("#status")).to_contain_text("already")
