"""What the serving bench measures on: its own views, a catalogue of 100,000 items, a `standard` ranker that was never trained.

Nothing here may import what reads `schemas.views` before `install` has put the bench's views there; `serving_process` is
what the function's own processes begin with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas import features as declare
from schemas import views as declared
from schemas.features import ITEM, USER, USER_CATEGORY, Entity, Feature, FeatureView

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from inference.encoder import TextEncoder
    from inference.runtime import LarderApplication
    from schemas.events import Event, Item

LIKED = "value >= 4"
CATEGORIES = (
    "drama",
    "comedy",
    "thriller",
    "romance",
    "western",
    "history",
    "nature",
    "travel",
    "music",
    "science",
    "sport",
    "crime",
    "war",
    "family",
    "fantasy",
    "horror",
    "animation",
    "noir",
    "opera",
    "documentary",
)
WORDS = [
    "quiet",
    "old",
    "bright",
    "lost",
    "northern",
    "hidden",
    "last",
    "silver",
    "broken",
    "long",
    "river",
    "garden",
    "winter",
    "harbour",
    "letter",
    "city",
    "road",
    "island",
    "summer",
    "mountain",
    "night",
    "house",
    "sea",
    "fire",
    "bridge",
    "stone",
    "forest",
    "mirror",
    "train",
    "window",
    "clock",
    "song",
]
FILE = "world.json"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the world is, and how much is asked of it."""

    items: int = 100_000
    people: int = 5_000
    events: int = 300_000
    days: int = 60
    encoded: int = 600
    """Texts that are really encoded; vectors of the others are mixtures of theirs."""
    size: str = "standard"
    requests: int = 400
    replayed: int = 100
    load_seconds: float = 60.0
    warming_seconds: float = 6.0
    """Twice and more what reading 100,000 items takes beside requests."""
    clients: int = 8
    starts: int = 12
    turns: int = 24
    block: int = 200
    """Two seconds and more: what telemetry does after the answers, every half second and less often, is paid within a turn."""
    flips: int = 100
    fuzzed: int = 4_000
    """Of each door: what two minutes allow. The long proof asks twenty thousand."""
    fuzz_warm_up: int = 10_000
    """So many before memory is watched, see `WARM_UP` of tests/inference/fuzz_doors.py."""


QUICK = Sizes(
    items=600,
    people=40,
    events=2_400,
    days=20,
    encoded=60,
    size="small",
    requests=20,
    replayed=5,
    load_seconds=1.5,
    warming_seconds=0.5,
    clients=3,
    starts=2,
    turns=2,
    block=8,
    flips=6,
    fuzzed=120,
    fuzz_warm_up=40,
)


def _ten(short: int, middle: int, long: int, longest: int) -> tuple[Feature, ...]:
    """Ten features over four windows."""
    windows = (short, middle, long, longest)
    return (
        *(declare.count(f"events_{days}d", days) for days in windows),
        declare.active_days(f"active_days_{middle}d", middle),
        declare.mean_value(f"value_mean_{long}d", long),
        declare.rate(f"liked_rate_{longest}d", longest, where=LIKED, state="liked"),
        declare.sum_value(f"value_sum_{short}d", short),
        declare.last_seen(f"last_seen_{longest}d", longest),
        declare.decayed_count(f"decayed_{longest}d", longest, half_life_days=7),
    )


def _view(name: str, entity: Entity, *features: Feature) -> FeatureView:
    return FeatureView(name, entity, "team:bench", "Features of the bench.", 3, features)


PERSON = _view("person", USER, *_ten(1, 7, 30, 60))
PRODUCT = _view("product", ITEM, *_ten(1, 7, 30, 60), *_ten(3, 10, 21, 50), *_ten(2, 14, 45, 55))
TASTE = _view("taste", USER_CATEGORY, *_ten(1, 7, 30, 60))
"""10 features of the person, 30 of each item, 10 of the person and each category: 50, of which 40 go with every candidate."""


def install() -> None:
    """Make these the views of this process, in place of the deployment's; call it first."""
    declared.VIEWS = (PERSON, PRODUCT, TASTE)
    declared.CONTEXT_VIEWS, declared.CANDIDATE_VIEWS, declared.CROSS_VIEWS = (PERSON,), (PRODUCT,), (TASTE,)


@dataclass(frozen=True, slots=True)
class World:
    """A deployment that serves: its database (the owner's URL), its artefacts, and some of its people and items."""

    url: str
    artifacts_url: str
    version: str
    people: list[str]
    items: list[str]

    def environment(self) -> dict[str, str]:
        """What the function's process is told, as `make serve` does: by two roles, with keys."""
        from infra import roles

        reader, writer = roles.serving_urls(self.url)
        assert reader != self.url, "the roles were not made"
        return {"DATABASE_URL": reader, "LARDER_WRITER_URL": writer, "ARTIFACTS_URL": self.artifacts_url}

    def key(self) -> str:
        """A new key that no limit slows down."""
        import psycopg

        from infra import keys

        with psycopg.connect(self.url) as connection:
            return keys.create(connection, "the bench", ("recommend", "write", "admin"), per_minute=1_000_000)

    def application(self, **more: Any) -> LarderApplication:
        """The real application in this process, warm, reading and writing by its two roles."""
        from inference.runtime import LarderApplication
        from inference.settings import Settings

        said = self.environment()
        more = {"access": "platform", "request_log": "off", **more}
        settings = Settings(said["DATABASE_URL"], said["ARTIFACTS_URL"], writer_url=said["LARDER_WRITER_URL"], **more)
        made = LarderApplication.from_settings(settings)
        made.warm()
        return made

    def keep(self, work: Path) -> None:
        """Remember in `work` where it lies."""
        (work / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def kept(cls, work: Path) -> World:
        """The world that was built in `work` before."""
        return cls(**json.loads((work / FILE).read_text()))


def body(world: World, number: int, **more: Any) -> bytes:
    """The request of the `number`-th person, of whom there are many: neither answers nor rows are in a cache of ours."""
    return json.dumps({"user_id": world.people[number % len(world.people)], "k": 10, **more}).encode()


def wish(number: int) -> str:
    """A wish that nobody had before: the encoder remembers those it had."""
    rng = np.random.default_rng(number)
    words = " ".join(rng.choice(WORDS, 4).tolist())
    return f"a {words} {rng.choice(CATEGORIES)} for evening {number}"


# ---- how it is made


def build(server: str, work: Path, sizes: Sizes) -> World:
    """Make the world below `work` and in a database of its own on `server`; views must be installed."""
    import psycopg

    from inference import artifacts
    from inference.encoder import TextEncoder
    from infra import postgres, registry
    from infra.feature_tables import ensure_view_tables
    from orchestration.compute.encoder import export_encoder
    from orchestration.compute.ingest import ingest
    from orchestration.compute.interactions import load_interactions
    from orchestration.compute.lake import Lake
    from orchestration.compute.lists import refresh_co_visitation, refresh_popular_items
    from orchestration.compute.materialise import materialise
    from orchestration.compute.vectors import refresh_item_vectors
    from schemas.manifest import CHAMPION_POINTER, ENCODER_PATH
    from tests.served_world import random_artifact
    from tests.worlds import ListSource

    url = _database(server)
    postgres.migrate(url)
    ensure_view_tables(url)
    lake, home = Lake((work / "lake").as_uri()), work / "artifacts"
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    catalogue = items(sizes, today)
    export_encoder(home / ENCODER_PATH)
    encoder = TextEncoder(home / ENCODER_PATH, threads=0)
    with psycopg.connect(url, options="-c TimeZone=UTC -c maintenance_work_mem=1GB") as connection:
        ingest(ListSource(list(events(sizes, today)), list(catalogue)), lake, connection, now=today)
        connection.commit()
        _text_vectors(connection, catalogue, encoder, sizes)
        interactions = load_interactions(lake, connection)
        refresh_co_visitation(connection, interactions)
        refresh_popular_items(connection, interactions, datetime.now(UTC))
        connection.commit()
    yesterday = (today - timedelta(days=1)).date()
    for view in declared.VIEWS:
        materialise(view, yesterday, yesterday, url=url, lake=lake)
    with psycopg.connect(url, options="-c TimeZone=UTC -c maintenance_work_mem=1GB") as connection:
        manifest, folder = random_artifact(connection, home, encoder, sizes.size)
        registry.register(connection, manifest, f"models/ranker/{manifest.version}")
        registry.record_gate(connection, manifest.version, True, {"words": ["random weights"]})
        refresh_item_vectors(connection, folder, encoder)
        registry.promote(connection, manifest.version)
        connection.commit()
        connection.autocommit = True
        connection.execute("VACUUM ANALYZE")
        who = [row[0] for row in connection.execute("SELECT DISTINCT user_id FROM user_history ORDER BY 1")]
    pointer = {"version": manifest.version, "path": f"models/ranker/{manifest.version}"}
    artifacts.put(home.as_uri(), CHAMPION_POINTER, json.dumps(pointer).encode())
    order = np.random.default_rng(1).permutation(len(who)).tolist()
    return World(
        url,
        home.as_uri(),
        manifest.version,
        [who[place] for place in order],
        [item.item_id for item in catalogue[:: max(len(catalogue) // 200, 1)]],
    )


def _database(server: str) -> str:
    import psycopg

    head, _, options = server.partition("?")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS larder_bench_serving WITH (FORCE)")
        connection.execute("CREATE DATABASE larder_bench_serving")
    return f"{head.rsplit('/', 1)[0]}/larder_bench_serving?{options}"


def items(sizes: Sizes, today: datetime) -> list[Item]:
    """A catalogue of one to three categories each; a hundredth of it came in the last weeks."""
    from schemas.events import Item

    rng = np.random.default_rng(0)
    words, many = rng.choice(WORDS, (sizes.items, 8)), rng.integers(1, 4, sizes.items)
    kinds = rng.choice(CATEGORIES, (sizes.items, 3))
    ages = np.where(rng.random(sizes.items) < 0.01, rng.integers(1, 28, sizes.items), 400)
    return [
        Item(
            f"item-{number:06d}",
            " ".join(words[number, :3].tolist()).title(),
            " ".join(words[number, 3:].tolist()),
            tuple(sorted(set(kinds[number, : many[number]].tolist()))),
            available_at=today - timedelta(days=int(ages[number])),
        )
        for number in range(sizes.items)
    ]


def events(sizes: Sizes, today: datetime) -> list[Event]:
    """Events of the last `days` whole days, people and items by a power law, half of them rated."""
    from schemas.events import Event

    rng = np.random.default_rng(2)

    def drawn(of: int) -> list[int]:
        found: list[int] = np.minimum((of * rng.power(0.6, sizes.events)).astype(np.int64), of - 1).tolist()
        return found

    who, what = drawn(sizes.people), drawn(sizes.items)
    ago = rng.uniform(1, sizes.days * 86_400, sizes.events).tolist()
    value = np.where(rng.random(sizes.events) < 0.5, rng.integers(1, 6, sizes.events), 0).tolist()
    return [
        Event(
            f"e{number}",
            f"user-{person:05d}",
            f"item-{item:06d}",
            "rating" if rated else "view",
            float(rated) if rated else None,
            today - timedelta(seconds=seconds),
        )
        for number, (person, item, rated, seconds) in enumerate(zip(who, what, value, ago, strict=True))
    ]


def _text_vectors(connection: Any, catalogue: list[Item], encoder: TextEncoder, sizes: Sizes) -> None:
    """Vectors for every text: of some as the encoder makes them, of the others mixtures of two of those, with noise.

    To encode all would take an hour and change no figure here: what is measured is how long a search among so many takes.
    """
    from pgvector import Vector
    from pgvector.psycopg import register_vector

    from orchestration.compute.vectors import written_by
    from schemas import prompts
    from schemas.ranker import TEXT_DIM

    wording = prompts.load(prompts.DEFAULTS["item"])
    texts = [prompts.render_item(wording, item) for item in catalogue]
    base = encoder.encode(texts[: sizes.encoded])
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, len(base), (2, len(texts)))
    vectors: NDArray[np.float32] = base[first] + 0.6 * base[second]
    vectors += rng.normal(0, 0.02, vectors.shape).astype(np.float32)
    vectors[: len(base)] = base
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    register_vector(connection)
    (index,) = connection.execute("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_text_vectors_hnsw'").fetchone()
    connection.execute("DROP INDEX ix_text_vectors_hnsw")  # made at once it takes a fraction of the time
    with connection.cursor().copy(
        "COPY text_vectors (item_id, text_hash, vector, written_by) FROM STDIN WITH (FORMAT BINARY)"
    ) as copy:
        copy.set_types(["text", "text", "vector", "text"])
        assert vectors.shape[1] == TEXT_DIM
        for item, text, vector in zip(catalogue, texts, vectors, strict=True):
            digest = prompts.text_hash(encoder.version, text)
            copy.write_row((item.item_id, digest, Vector(vector), written_by(wording.version, encoder.version)))
    connection.execute(index)
    connection.commit()
