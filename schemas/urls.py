"""Where files lie: `file:///folder` or `s3://bucket/prefix`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit


def local_folder(url: str) -> Path | None:
    """The folder that a `file://` URL names, None for any other URL. What is escaped in it (`%20`) is a character."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file://") else None
