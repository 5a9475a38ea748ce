"""The arguments of the commands behind `make`: what is wrong with them is said in the words of make."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from schemas.errors import RequestError
from schemas.events import InvalidRow, check_id


class MakeParser(argparse.ArgumentParser):
    """A parser whose errors name make's variables, and end with the make command. Its status for them is 2, as argparse's.

    `command` is that command as it is typed; None: there is none in make, and errors are argparse's own. Subcommands are such
    parsers, too: `add_parser` takes their `command`. An option's variable is its name in capitals, unless `variables` has another.
    """

    def __init__(
        self, command: str | None = None, *, variables: Mapping[str, str] | None = None, **options: object
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # argparse's own, passed on
        self.command = command
        self.variables = variables or {}

    def error(self, message: str) -> NoReturn:
        if self.command is None:
            super().error(message)
        message = re.sub(r"(?<!\S)--[a-z-]+", lambda found: self._named(found[0]), message)
        self.exit(2, f"error: {message}\n  {self.command}\n")

    def _named(self, option: str) -> str:
        name = option.removeprefix("--")
        return f"{self.variables.get(name, name.upper().replace('-', '_'))}= ({option})"


def person_id(given: str, named: str = "USER_ID= (--user)") -> str:
    """Whom the argument `named` names; `-` reads the id from standard input. Raises RequestError for what cannot be anybody's."""
    user_id = sys.stdin.readline().rstrip("\n") if given == "-" else given
    try:
        return check_id("user_id", user_id)
    except InvalidRow as error:
        raise RequestError(f"{named} cannot be anybody's id: {error}") from error
