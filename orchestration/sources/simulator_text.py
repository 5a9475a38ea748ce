"""Titles and descriptions of simulated items: words drawn by theme weights, so that text tells about taste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Theme:
    """One interpretable direction of the world: its name and the words that give it away.

    Nouns and roles are singular, acts are in the third person, places begin with a preposition.
    """

    name: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    roles: tuple[str, ...]
    acts: tuple[str, ...]
    places: tuple[str, ...]


def _theme(name: str, adjectives: str, nouns: str, roles: str, acts: str, places: str) -> Theme:
    lists = [tuple(part.strip() for part in text.split(",")) for text in (adjectives, nouns, roles, acts, places)]
    return Theme(name, *lists)


THEMES: tuple[Theme, ...] = (
    _theme(
        "Adventure",
        "daring, uncharted, stranded, restless, sunburnt, fearless, perilous, windswept",
        "compass, island, treasure, expedition, canyon, lifeboat, rope bridge, map, summit, caravan, shipwreck, jungle",
        "explorer, smuggler, mountaineer, castaway, river guide, young stowaway",
        "sets out for a lost city, follows half a map, races a rival to the summit, crosses the desert on foot, "
        "searches for a sunken galleon, escapes down the rapids",
        "on an uncharted island, across the high desert, beyond the last trading post, under the glacier, "
        "along a forgotten river, in the deep jungle",
    ),
    _theme(
        "Comedy",
        "hapless, cheerful, clumsy, hilarious, absurd, well-meaning, mischievous, overdressed",
        "prank, wedding cake, landlord, mix-up, parrot, job interview, costume, neighbour, joke, alibi, toupee, banquet",
        "waiter, substitute teacher, unlucky plumber, failed comedian, meddling aunt, party planner",
        "pretends to be a duke, ruins the same wedding twice, hides a goat from the landlord, bluffs through a dinner party, "
        "starts a rumour that gets out of hand, takes the wrong suitcase",
        "at a crumbling hotel, in a town with one bus, at the office party, during a very long dinner, "
        "on a package holiday, in the flat upstairs",
    ),
    _theme(
        "Crime",
        "crooked, ruthless, stolen, shady, wanted, double-crossed, hard-boiled, corrupt",
        "heist, ledger, getaway, safe, informer, casino, ransom, syndicate, pistol, alley, bribe, prison",
        "safecracker, detective, getaway driver, forger, crooked lawyer, mob accountant",
        "plans one last job, turns on the syndicate, hides the ransom, shadows a corrupt judge, "
        "walks into a double cross, cracks an impossible vault",
        "in the back rooms of a casino, under the docks, in rain-soaked alleys, inside a federal prison, "
        "above a pawn shop, on the wrong side of town",
    ),
    _theme(
        "Fantasy",
        "enchanted, cursed, ancient, gilded, moonlit, forbidden, elven, thorned",
        "dragon, spell, crown, sorcerer, prophecy, rune, enchanted sword, goblin, kingdom, oracle, amulet, griffin",
        "apprentice witch, exiled prince, dragon rider, blind oracle, reluctant knight, shape-shifter",
        "breaks an old curse, bargains with a dragon, steals the last spell, guards a sleeping crown, "
        "answers an ancient prophecy, wakes the stone giants",
        "in a kingdom of thorns, beyond the mirror gate, in the tower of runes, under the faerie hill, "
        "at the court of winter, among the elder trees",
    ),
    _theme(
        "History",
        "imperial, exiled, besieged, revolutionary, forgotten, royal, wartime, colonial",
        "empire, treaty, siege, dynasty, regiment, cathedral, courtier, telegram, revolution, throne, trench, chronicle",
        "young general, queen in exile, court painter, field nurse, royal archivist, deserter",
        "carries a secret treaty, holds the city through the siege, defies the emperor, writes letters from the front, "
        "survives the revolution, betrays the throne",
        "at the fall of an empire, behind the lines in 1916, in a besieged fortress, at the royal court, "
        "during the long retreat, in occupied streets",
    ),
    _theme(
        "Horror",
        "haunted, sinister, buried, bloodstained, whispering, undead, feverish, nameless",
        "crypt, scream, cellar, ghost, ritual, scarecrow, asylum, coffin, curse, shadow, mask, swarm",
        "gravedigger, night nurse, possessed child, last survivor, sleepless widow, cult leader",
        "hears scratching in the walls, opens the sealed cellar, wakes in a coffin, is hunted by a masked stranger, "
        "digs up what was buried, counts the missing every night",
        "in a haunted asylum, in the house at the end of the lane, beneath the old crypt, in a village without mirrors, "
        "after the lights go out, in the fog",
    ),
    _theme(
        "Music",
        "melodic, off-key, electric, soulful, unplugged, sold-out, syncopated, brassy",
        "guitar, chorus, encore, piano, melody, tour bus, record label, drummer, jazz club, violin, songbook, microphone",
        "street busker, fading singer, stubborn conductor, jazz pianist, choir leader, teenage drummer",
        "writes one perfect song, reunites the old band, loses the voice before the concert, tours in a broken van, "
        "learns the violin at sixty, records a secret album",
        "in a smoky jazz club, on the last tour, in a basement studio, at the conservatory, "
        "backstage at the opera, on a borrowed stage",
    ),
    _theme(
        "Mystery",
        "hidden, vanished, cryptic, locked, puzzling, anonymous, suspicious, missing",
        "clue, cipher, locked room, witness, poison, portrait, riddle, alias, footprint, testament, photograph, secret",
        "amateur sleuth, retired inspector, village librarian, crossword setter, unreliable witness, private investigator",
        "finds a body in the library, decodes an anonymous letter, suspects every guest, retraces a stranger's last day, "
        "doubts the only witness, reopens a forgotten case",
        "on a snowbound train, in a country house, in a village that keeps secrets, at the reading of a will, "
        "behind a locked door, in the family archive",
    ),
    _theme(
        "Nature",
        "wild, migrating, untamed, frozen, tidal, endangered, leafy, nocturnal",
        "forest, whale, wolf pack, coral reef, meadow, glacier, river delta, owl, rainforest, bear, wetland, savannah",
        "wildlife ranger, marine biologist, beekeeper, bird watcher, patient camera crew, herder",
        "follows a wolf pack through winter, counts the last whales, waits a year for a snow leopard, "
        "replants a burnt forest, rescues a stranded seal, films the great migration",
        "above the arctic circle, on the coral reef, in the old-growth forest, across the savannah, "
        "in the tidal marsh, at the edge of the ice",
    ),
    _theme(
        "Romance",
        "tender, lovelorn, star-crossed, longing, blushing, devoted, passionate, jilted",
        "love letter, kiss, honeymoon, rose garden, first date, proposal, heartbreak, waltz, confession, summer, bouquet, promise",
        "florist, shy bookseller, runaway bride, pen friend, widowed baker, childhood sweetheart",
        "falls for a rival, answers a love letter meant for another, meets the same stranger every summer, "
        "calls off the wedding, confesses far too late, learns to love again",
        "in a little bookshop, under the lanterns of Lisbon, on the last ferry home, in a vineyard in June, "
        "at a wedding by the sea, in a shared umbrella",
    ),
    _theme(
        "Science Fiction",
        "orbital, synthetic, quantum, interstellar, cloned, weightless, robotic, alien",
        "starship, android, wormhole, colony, signal, time loop, satellite, reactor, clone, galaxy, airlock, algorithm",
        "cyborg pilot, station engineer, runaway android, xenobiologist, time traveller, colony doctor",
        "answers a signal from deep space, repairs a dying starship, meets an older clone, escapes a time loop, "
        "teaches a machine to dream, lands on a silent planet",
        "aboard a generation ship, on the far side of Titan, inside a failing simulation, in orbit around a dead star, "
        "on the first Mars colony, beyond the wormhole",
    ),
    _theme(
        "Sport",
        "undefeated, underdog, injured, breakaway, sweating, unranked, sprinting, triumphant",
        "championship, penalty, marathon, goalkeeper, boxing ring, relay, trophy, stadium, coach, finish line, rematch, locker room",
        "washed-up boxer, rookie goalkeeper, marathon runner, stubborn coach, young gymnast, benched striker",
        "trains for a final chance, comes back from injury, coaches the worst team in the league, runs for a lost friend, "
        "refuses to throw the match, fights for the title",
        "in the last minute of the final, on the training ground, in a small-town boxing gym, at the national championship, "
        "under the stadium lights, on the relegation bench",
    ),
)
"""The themes in the order of the latent vectors' first columns."""

STYLES: tuple[tuple[str, str], ...] = (
    ("unhurried", "breathless"),
    ("bleak", "heartwarming"),
    ("intimate", "sweeping"),
    ("realistic", "dreamlike"),
    ("talkative", "wordless"),
    ("classic", "experimental"),
)
"""One idiosyncratic factor per row: the word for its negative and for its positive end."""

FORMATS: tuple[str, ...] = ("film", "series", "short film", "documentary", "miniseries")
TEXT_DRAWS = 32
"""How many uniform numbers one item's text takes; fixed, so that each item's words are its own."""

_TITLES = (
    "The {adjective} {noun}",
    "{adjective} {noun}",
    "The {noun} and the {other}",
    "The {role}'s {noun}",
    "One {noun} for the {role}",
    "The Last {noun}",
    "{noun} and {other}",
    "Beyond the {adjective} {noun}",
)
_TURNS = (
    "It begins with {a_noun} and ends with {a_other}.",
    "There is {a_noun} to win back, and {a_other} nobody expected.",
    "Soon {a_noun} and {a_other} change everything.",
    "What matters is {a_noun}, until {a_other} turns up.",
    "Only {a_noun} and {a_other} stand in the way.",
)
_MEANWHILE = (
    "Meanwhile {a_role} {act} {place}.",
    "Elsewhere {a_role} {act} {place}.",
    "Then {a_role} {act} {place}.",
    "Years later {a_role} {act} {place}.",
)


def item_texts(
    themes: NDArray[np.float32], styles: NDArray[np.float32], draws: NDArray[np.float64]
) -> Iterator[tuple[str, str, str]]:
    """Yield (title, description, format) of each item, in order.

    themes: (n, len(THEMES)) weights ≥ 0; styles: (n, len(STYLES)) signed strengths; draws: (n, TEXT_DRAWS) in [0, 1).
    Titles are not yet unique: see `unique_titles`.
    """
    for weights, style, numbers in zip(themes, styles, draws, strict=True):
        yield _Words(weights, style, numbers).write()


def unique_titles(titles: Iterator[str]) -> Iterator[str]:
    """Yield each title once as it is and again as a sequel (`… II`, `… III`): stable however many follow."""
    taken: dict[str, int] = {}
    for title in titles:
        taken[title] = taken.get(title, 0) + 1
        yield title if taken[title] == 1 else f"{title} {_roman(taken[title])}"


def category_names(weights: NDArray[np.float32]) -> tuple[str, ...]:
    """Names of an item's themes, strongest first, from (len(THEMES),) weights; a faint theme is not a category."""
    order = np.argsort(-weights, kind="stable")
    return tuple(THEMES[index].name for index in order if weights[index] >= 0.25)


class _Words:
    """One item's stream of draws, spent word by word."""

    def __init__(self, weights: NDArray[np.float32], style: NDArray[np.float32], draws: NDArray[np.float64]) -> None:
        self._cumulative = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
        self._main = THEMES[int(np.argmax(weights))]
        self._style = style
        self._draws = iter(draws.tolist())

    def write(self) -> tuple[str, str, str]:
        title = _capitals(self._fill(self._pick(_TITLES), self._main, self._main))
        form = self._pick(FORMATS)
        opening = _sentence(self._fill("{a_adjective} {role} {act} {place}.", self._main, self._main))
        turn = self._fill(self._pick(_TURNS), self._any_theme(), self._any_theme())
        second = self._any_theme()
        meanwhile = self._fill(self._pick(_MEANWHILE), second, second)
        strongest = np.argsort(-np.abs(self._style), kind="stable")[:3]
        words = [STYLES[index][int(self._style[index] > 0)] for index in strongest]
        closing = _sentence(f"{_article(words[0])}, {words[1]} and {words[2]} {form}.")
        return title, f"{opening} {turn} {meanwhile} {closing}", form

    def _pick(self, choices: tuple[str, ...]) -> str:
        return choices[int(next(self._draws) * len(choices))]

    def _any_theme(self) -> Theme:
        index = int(np.searchsorted(self._cumulative, next(self._draws), side="right"))
        return THEMES[min(index, len(THEMES) - 1)]

    def _fill(self, pattern: str, theme: Theme, other_theme: Theme) -> str:
        """Fill a pattern; `other` is a second noun, never the first one again."""
        noun = self._pick(theme.nouns)
        other = self._pick(tuple(word for word in other_theme.nouns if word != noun))
        adjective, role = self._pick(theme.adjectives), self._pick(theme.roles)
        return pattern.format(
            adjective=adjective,
            noun=noun,
            other=other,
            role=role,
            act=self._pick(theme.acts),
            place=self._pick(theme.places),
            a_adjective=_article(adjective),
            a_noun=_article(noun),
            a_other=_article(other),
            a_role=_article(role),
        )


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _capitals(title: str) -> str:
    small = {"and", "the", "for", "of", "a"}
    words = title.split(" ")
    return " ".join(w if i and w.lower() in small else w[0].upper() + w[1:] for i, w in enumerate(words))


def _roman(number: int) -> str:
    signs = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
    text = ""
    for value, sign in signs:
        count, number = divmod(number, value)
        text += sign * count
    return text
