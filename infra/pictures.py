"""`make pictures`: the README's pictures, taken from the current deployment's Dagster UI in a headless browser."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from infra.ui import LINEAGE

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "asset-graph": LINEAGE,
    "feature-view": "/assets/item_activity?view=partitions",
}
_WIDTH, _HEIGHT = 1500, 950
_PATIENCE_SECONDS = 90


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.pictures", description=__doc__)
    parser.add_argument("--port", type=int, default=3999)
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ui = subprocess.Popen([sys.executable, "-m", "infra.ui", "--port", str(options.port)])
    try:
        _wait(f"http://127.0.0.1:{options.port}/server_info")
        _photograph(f"http://127.0.0.1:{options.port}", options.folder)
    finally:
        ui.terminate()
        ui.wait()
    return 0


def _wait(url: str) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            if time.monotonic() > end:
                raise SystemExit(f"the UI did not answer at {url} within {_PATIENCE_SECONDS} s") from None
            time.sleep(1)


def _photograph(base: str, folder: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--window-size={_WIDTH},{_HEIGHT}",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.binary_location = "/usr/bin/chromium"
        browser = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
        try:
            for name, path in PAGES.items():
                browser.get(f"{base}{path}")
                time.sleep(8)  # the page draws itself from several queries, one after the other
                browser.save_screenshot(str(folder / f"{name}.png"))
                print(f"{folder / name}.png")
        finally:
            browser.quit()


if __name__ == "__main__":
    sys.exit(main())
