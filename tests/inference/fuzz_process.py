"""A door fuzzed in a process of its own, whose memory nothing else uses: no test runner that keeps every line of log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests")]

from fuzz import Fuzzer  # noqa: E402
from fuzz_doors import WARM_UP, Report, fuzz  # noqa: E402
from released import ITEMS, PEOPLE  # noqa: E402
from worlds import serving  # noqa: E402

from inference.runtime import LarderApplication  # noqa: E402

_ASKED = "LARDER_FUZZ"
"""What is asked goes through the environment: a command line with a key in it is everybody's to read."""


def fuzz_apart(
    door: str,
    url: str,
    artifacts_url: str,
    headers: Mapping[str, str],
    *,
    seed: int,
    requests: int,
    warm_up: int = WARM_UP,
) -> Report:
    """What a new process finds at `door` of an application on the database at `url`; `headers` hold its key.

    Raises RuntimeError, with the end of what the process said, if it ended otherwise than by its report.
    """
    asked = {
        "door": door,
        "url": url,
        "artifacts_url": artifacts_url,
        "headers": dict(headers),
        "seed": seed,
        "requests": requests,
        "warm_up": warm_up,
    }
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__],
            env=os.environ | {_ASKED: json.dumps(asked)},
            stdout=subprocess.PIPE,
            stderr=said,
            check=False,
        )
        if done.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"the process that fuzzed {door} ended with {done.returncode}: {said.read()[-2_000:]}")
    report = json.loads(done.stdout)
    report["statuses"] = {int(status): count for status, count in report["statuses"].items()}
    return Report(**report)


def main() -> None:
    asked = json.loads(os.environ[_ASKED])
    app = LarderApplication.from_settings(serving(asked["url"], asked["artifacts_url"], request_log="off"))
    app.warm()
    try:
        fuzzer = Fuzzer(asked["seed"], PEOPLE, ITEMS, asked["headers"])
        report = fuzz(asked["door"], app, fuzzer, asked["requests"], asked["warm_up"])
    finally:
        app.close()
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
