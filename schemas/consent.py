"""Consent to being personalised: what holds for a person who has not said, and what the answers call its absence."""

from __future__ import annotations

import os
from collections.abc import Mapping

from schemas.errors import SettingsError

SETTING = "LARDER_CONSENT_DEFAULT"
WORDS = {"yes": True, "no": False}
DEGRADED = "consent"
"""What `degraded` holds when an answer was made without anything of the person, because they have not agreed to that."""


def consent_default(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a person who has said nothing is personalised. Raises SettingsError for anything but yes and no.

    Functions and Dagster must be told the same: one decides what is served, the other what is trained on.
    """
    said = environ.get(SETTING, "yes").strip().lower()
    if said not in WORDS:
        raise SettingsError(f"{SETTING} is {said!r}; give yes or no")
    return WORDS[said]
