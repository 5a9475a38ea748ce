"""How a command ends when an error of ours, or Ctrl-C, is caught by nobody: with one line instead of a traceback.

Declarations are checked as `schemas.views` is imported, before any command's own `main` could catch what is wrong.
"""

from __future__ import annotations

import sys
from types import TracebackType

from schemas.errors import LarderError


def end_with_one_line() -> None:
    """Called by a package as it is imported: does something only if the package holds the command being started.

    `python -m package.command` imports the package while `-m` still stands in the command's place.
    """
    if sys.argv[:1] == ["-m"]:
        sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, LarderError):
        print(f"error ({error.type}): {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
