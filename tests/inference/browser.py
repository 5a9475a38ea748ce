"""Debian's Chromium, driven by Playwright: a page that keeps what it asked for and what it complained of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = os.environ.get("LARDER_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package chromium)")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; nothing is downloaded for it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """An open page: `outside` are requests to anywhere but `base`, `complaints` what stands in its console."""

    page: Any
    base: str
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def clean(self) -> None:
        """Fails if the page asked anybody else for something, or complained."""
        assert self.outside == []
        assert self.complaints == []


@contextmanager
def opened(browser: Any, base: str, path: str = "", **how: Any) -> Iterator[Watched]:
    """A page of its own at `base + path`; `how` are a context's options (viewport, color_scheme …)."""
    context = browser.new_context(**how)
    page = context.new_page()
    page.set_default_timeout(20_000)
    watched = Watched(page, base)

    def asked(request: Any) -> None:
        if not request.url.startswith((base, "blob:", "data:")):
            watched.outside.append(request.url)

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            watched.complaints.append(f"{message.type}: {message.text}")

    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    try:
        page.goto(base + path)
        yield watched
    finally:
        context.close()
