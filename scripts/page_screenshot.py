"""Ask a question on a running server's page, and keep what it shows as a picture.

    focusllm serve --store STORE --port 8123 &
    python scripts/page_screenshot.py http://127.0.0.1:8123 docs/images/page.png

The documents are topics of Python's language reference, which every Python carries. The browser is the system's
(``apt install chromium``).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from pydoc_data.topics import topics

from playwright.sync_api import expect, sync_playwright

TOPICS = ("assert", "break", "continue", "del", "for", "if", "import", "pass", "raise", "return", "try", "while")
QUESTION = "Where may break occur?"
SECONDS = 900


def main() -> None:
    """Read the arguments, fill a memory, ask, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--question", default=QUESTION)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        page.set_default_timeout(1000 * SECONDS)
        page.goto(arguments.url)
        page.get_by_label("New memory").fill("python")
        page.get_by_role("button", name="Create").click()
        expect(page.locator("#memory")).to_have_value("python")
        files = [{"name": f"{key}.txt", "mimeType": "text/plain", "buffer": topics[key].encode()} for key in TOPICS]
        page.locator("#files").set_input_files(files)
        expect(page.locator("#document-count")).to_have_text(str(len(TOPICS)), timeout=1000 * SECONDS)
        page.get_by_label("Ask about the memory").fill(arguments.question)
        page.get_by_role("button", name="Ask").click()
        page.locator("#answer button").first.click()
        expect(page.locator("#passage mark")).to_be_visible()
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        page.screenshot(path=arguments.picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
