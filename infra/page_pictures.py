"""`make pictures`: the page's pictures in docs/, of the current deployment's function, taken in a headless browser.

Nothing that is pressed here is kept: the browser never gets to post an event.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

DOCS = Path(__file__).parents[1] / "docs"
WISH = "a mystery by the sea"
MOST_BYTES = 150_000
_DESK = {"viewport": {"width": 1180, "height": 900}}
_PHONE = {"viewport": {"width": 360, "height": 760}, "device_scale_factor": 1.5, "has_touch": True}
_ROW = "#list > .item:not(.skeleton)"
_PATIENCE_MS = 30_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.page_pictures", description=__doc__)
    parser.add_argument("--port", type=int, default=3998)
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pictures go")
    parser.add_argument("--user", help="whose list (default: somebody with a long history)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "infra.serve", "--port", str(options.port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        key = _key_of(server)
        base = f"http://127.0.0.1:{options.port}/"
        _photograph(base, key, options.user or _somebody(base, key), options.folder)
    finally:
        server.terminate()
        server.wait()
    return 0


def _key_of(server: subprocess.Popen[str]) -> str:
    """The development key that the server prints, once it listens."""
    told = ""
    assert server.stdout is not None
    for line in server.stdout:
        told += line
        if "larder listens on" in line:
            return told.partition("export LARDER_KEY=")[2].split()[0]
    raise SystemExit(f"the function did not start:\n{told}")


def _somebody(base: str, key: str) -> str:
    """The one of the people who may be shown that has the longest history."""

    def get(path: str) -> Any:
        asked = urllib.request.Request(f"{base}{path}", headers={"authorization": f"Bearer {key}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    people: list[str] = get("people")["people"]
    if not people:
        raise SystemExit("nobody has a history here; run `make run` first")
    return max(people, key=lambda user: len(get(f"people/{quote(user, safe='')}/history?limit=200")["events"]))


def _photograph(base: str, key: str, user: str, folder: Path) -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    def shoot(browser: Any, name: str, how: dict[str, Any], then: Callable[[Any], None]) -> None:
        context = browser.new_context(**how, reduced_motion="reduce")
        page = context.new_page()
        page.set_default_timeout(_PATIENCE_MS)
        page.route("**/events", lambda route: route.abort())
        page.goto(f"{base}#key={key}&person={user}")
        page.wait_for_selector(_ROW)
        page.wait_for_selector("#history time")
        then(page)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        file = folder / f"page-{name}.png"
        page.screenshot(path=file)
        context.close()
        # A page of few colours: a palette of them is a third of the bytes, and looks the same.
        Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
        if file.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{file.name} has {file.stat().st_size:,} bytes; {MOST_BYTES:,} are allowed")
        print(file)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        shoot(browser, "list", _DESK, lambda page: None)
        shoot(browser, "why", _DESK, _ask_why)
        shoot(browser, "wish", _DESK, _wish)
        shoot(browser, "phone", _PHONE, _wish)
        shoot(browser, "dark", _DESK | {"color_scheme": "dark"}, _judge)
        browser.close()


def _ask_why(page: Any) -> None:
    page.click(f"{_ROW}:nth-child(2) .why")


def _wish(page: Any) -> None:
    page.fill("#wish", WISH)
    with page.expect_response("**/recommendations"):
        page.keyboard.press("Enter")
    page.wait_for_selector("#list-title:text('For')")


def _judge(page: Any) -> None:
    page.click(f"{_ROW}:nth-child(1) .up")
    page.click(f"{_ROW}:nth-child(3) .down")
    page.click(f"{_ROW}:nth-child(4) .hide")


if __name__ == "__main__":
    sys.exit(main())
