"""Tastes for categories in words: what training wishes for, and what prompt-following is measured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from inference.encoder import TextEncoder
from orchestration.compute.co_visitation import popularity
from orchestration.compute.interactions import Interactions
from orchestration.compute.prompt_records import PromptVersions
from orchestration.compute.wishes import Wishes
from schemas import prompts

EXAMPLES = 3
"""Titles that stand for a category where a profile template names some."""


def membership(categories: Sequence[Sequence[str]]) -> tuple[list[str], NDArray[np.bool_]]:
    """The names in use, sorted, and `(items, c) bool`: which item is in which."""
    names = sorted({name for held in categories for name in held})
    place = {name: index for index, name in enumerate(names)}
    member = np.zeros((len(categories), len(names)), bool)
    for item, held in enumerate(categories):
        member[item, [place[name] for name in held]] = True
    return names, member


def category_wishes(
    versions: PromptVersions,
    names: Sequence[str],
    member: NDArray[np.bool_],
    titles: Sequence[str],
    counts: NDArray[np.float32],
) -> list[str]:
    """What somebody with a taste for each of `names (c,)` would ask for, as the text that is encoded.

    Examples are the titles had most, by `counts (items,)`, among `titles (items,)`.
    """
    profile, wish = prompts.load(versions.profile), prompts.load(versions.wish)
    texts = []
    for place, name in enumerate(names):
        held = np.flatnonzero(member[:, place])
        most = held[np.argsort(-counts[held], kind="stable")][:EXAMPLES]
        taste = prompts.render_profile(profile, [name], [titles[item] for item in most.tolist() if titles[item]])
        texts.append(prompts.render_wish(wish, taste))
    return texts


def wishes_for(
    connection: psycopg.Connection[Any], interactions: Interactions, encoder: TextEncoder, versions: PromptVersions
) -> Wishes:
    """A wish for each category, encoded as a wish in a request is: by the int8 `encoder`."""
    found = {
        item_id: (title, categories)
        for item_id, title, categories in connection.execute("SELECT item_id, title, categories FROM items")
    }
    titles, categories = zip(*(found.get(item_id, ("", [])) for item_id in interactions.item_ids.tolist()), strict=True)
    names, member = membership(categories)
    texts = category_wishes(versions, names, member, titles, popularity(interactions))
    return Wishes(encoder.encode(texts), member)
