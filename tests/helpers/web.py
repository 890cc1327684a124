"""Pages in a real browser: headless Chromium, driven by Playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.will_it_fit import browser as a_browser

DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; skips the test with a reason if there is none."""
    with a_browser() as opened:
        if opened is None:
            pytest.skip("no Chromium or Chrome is installed, or not the extra web (Playwright)")
        yield opened


class Visit:
    """A page that is open in a browser, and everything that went wrong there."""

    def __init__(
        self, opened: Any, file: Path, fragment: str = "", size: tuple[int, int] = DESKTOP, **about: Any
    ) -> None:
        context = opened.new_context(viewport={"width": size[0], "height": size[1]}, **about)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = file.resolve().as_uri()
        self.page.goto(self.address + fragment)

    def others_asked(self) -> list[str]:
        """Requests other than for the page itself."""
        return [url for url in self.requests if url.partition("#")[0] != self.address and not url.startswith("data:")]

    def overflow(self) -> int:
        """The pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def accessibility(self) -> list[str]:
        """Violations found by axe-core, such as of contrast and of labels."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
        )
        found = axe.Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {[node['html'][:90] for node in each['nodes']][:3]}" for each in found]
