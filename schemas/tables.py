"""The database's tables, as SQLAlchemy metadata. Migrations must produce exactly these (a test compares).

Tables of feature views are not listed by hand: `view_table` builds one from a declaration, in the Postgres
schema `features`, where `orchestration/compute/materialise.py` creates and widens them.
"""

from __future__ import annotations

from typing import Any

from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from schemas.declarations import meaning
from schemas.features import FeatureView
from schemas.ranker import TEXT_DIM

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Instant = DateTime(timezone=True)


def _now(name: str) -> Column[Any]:
    return Column(name, Instant, nullable=False, server_default=func.now())


deployment = Table(
    "deployment",
    metadata,
    Column("name", Text, primary_key=True, comment="the deployment this database belongs to"),
    _now("created_at"),
    comment="One row: a database serves one deployment.",
)

# --- catalogue and people ----------------------------------------------------------------------------------------

items = Table(
    "items",
    metadata,
    Column("item_id", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("categories", ARRAY(Text), nullable=False, server_default="{}"),
    Column("attributes", JSONB, nullable=False, server_default="{}"),
    Column("available_at", Instant, comment="NULL: always been there"),
    _now("updated_at"),
    comment="The catalogue.",
)

catalogue_changes = Table(
    "catalogue_changes",
    metadata,
    Column("change_id", BigInteger, Identity(always=True), primary_key=True),
    _now("changed_at"),
    comment="That items, their vectors or their packed features were written to, told by triggers: a process that keeps items "
    "in memory asks whether this still reads as it did. What is older than an hour goes with the next.",
)

people = Table(
    "people",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("profile", JSONB, nullable=False, server_default="{}"),
    _now("updated_at"),
    comment="Profiles: what is known of a person besides events.",
)

# --- events ------------------------------------------------------------------------------------------------------

event_keys = Table(
    "event_keys",
    metadata,
    Column("event_id", Text, primary_key=True),
    Column("occurred_at", Instant, nullable=False),
    comment="Ids of all events, in the lake or on their way to it: what makes a repeated event change nothing.",
)

recent_events = Table(
    "recent_events",
    metadata,
    Column("event_id", Text, primary_key=True),
    Column("occurred_at", Instant, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("item_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Double),
    Column("known_at", Instant, nullable=False, server_default=func.now()),
    Column("request_id", Text, comment="the recommendation that led to the event, if one did"),
    Column("drained", Boolean, nullable=False, server_default=text("false"), comment="true once the lake has it"),
    Column(
        "stored_by",
        BigInteger,
        server_default=text("((pg_current_xact_id())::text)::bigint"),
        comment="the transaction that stored it: tells which reads saw it; NULL: stored before this was kept",
    ),
    Index(None, "user_id", "occurred_at"),
    Index(None, "item_id", "occurred_at"),
    Index("ix_recent_events_undrained", "occurred_at", postgresql_where=text("NOT drained")),
    postgresql_partition_by="RANGE (occurred_at)",
    comment="The last days of events, one partition a day: feeds feature heads and the drain into the lake.",
)

user_history = Table(
    "user_history",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("occurred_at", Instant, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("item_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Double),
    comment="Each person's last 200 events, whatever the windows and the retention.",
)

lake_files = Table(
    "lake_files",
    metadata,
    Column("day", Date, primary_key=True),
    Column("path", Text, nullable=False, comment="below LAKE_URL"),
    Column("rows", BigInteger, nullable=False),
    Column("generation", Integer, nullable=False),
    _now("written_at"),
    Column(
        "keyed",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="whether event_keys has the id of every event of the file",
    ),
    Column("previous", Text, comment="the file before, kept for readers that began earlier"),
    comment="The current Parquet file of each day: swapping this row is what makes a rewrite of a day atomic.",
)

ingests = Table(
    "ingests",
    metadata,
    Column("ingest_id", BigInteger, Identity(always=True), primary_key=True),
    Column("source", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("read_rows", BigInteger, nullable=False),
    Column("stored_rows", BigInteger, nullable=False),
    Column("duplicate_rows", BigInteger, nullable=False),
    Column("quarantined_rows", BigInteger, nullable=False),
    Column("items", BigInteger, nullable=False),
    Column("people", BigInteger, nullable=False),
    Column(
        "forgotten_rows",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="kept out: their people are forgotten",
    ),
    _now("finished_at"),
    CheckConstraint(
        "read_rows = stored_rows + duplicate_rows + quarantined_rows + forgotten_rows", name="counts_add_up"
    ),
    comment="Finished loads of a source; the counts add up by constraint.",
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("quarantine_id", BigInteger, Identity(always=True), primary_key=True),
    Column("source", Text, nullable=False),
    Column("file", Text, nullable=False),
    Column("line", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("row", Text, nullable=False),
    _now("seen_at"),
    UniqueConstraint("source", "file", "line", "reason"),
    comment="Rows that could not be stored, where they were and why.",
)

# --- features ----------------------------------------------------------------------------------------------------

feature_ledger = Table(
    "feature_ledger",
    metadata,
    Column("view", Text, primary_key=True),
    Column("partition_date", Date, primary_key=True),
    Column("definition_hash", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False, comment="events of that day in the lake when it was built"),
    _now("built_at"),
    Column(
        "stale_at",
        Instant,
        comment="since when it holds what it should not; NULL: it does not. Still served until rebuilt",
    ),
    Column("seen", Text, comment="pg_snapshot from before the lake was read: events of which transactions it may hold"),
    comment="Which partition of which view was built, from which definition; written with the data.",
)


def view_table(view: FeatureView) -> Table:
    """The snapshot table of `view`: one row per partition and entity, one column per state and window."""
    columns: list[Column[Any]] = [Column("partition_date", Date, primary_key=True)]
    columns += [Column(key, Text, primary_key=True) for key in view.entity.keys]
    for name, state, days in view.columns:
        kind = Instant if state.is_instant else BigInteger if state.is_count else Double
        used = ", ".join(one.name for one in view.features if one.window_days == days and state in one.states)
        columns.append(Column(name, kind, comment=f"{meaning(state)} over {days} d, for {used}"))
    return Table(view.name, MetaData(schema="features"), *columns, comment=view.description)


# --- vectors and lists -------------------------------------------------------------------------------------------

item_enrichments = Table(
    "item_enrichments",
    metadata,
    Column("item_id", Text, ForeignKey("items.item_id", ondelete="CASCADE"), primary_key=True),
    Column(
        "source_hash", Text, nullable=False, comment="of the item's text as it was sent, the template and the model"
    ),
    Column("about", Text, nullable=False, comment="encoded after the item's own description"),
    Column("written_by", Text, nullable=False, comment="template and model"),
    _now("written_at"),
    comment="A few words about items by a language model, where there is one.",
)

text_vectors = Table(
    "text_vectors",
    metadata,
    Column("item_id", Text, ForeignKey("items.item_id", ondelete="CASCADE"), primary_key=True),
    Column("text_hash", Text, nullable=False, comment="of the text as it was encoded, and of the encoder"),
    Column("vector", VECTOR(TEXT_DIM), nullable=False),
    Column("written_by", Text, comment="item template and encoder; NULL: from before this was kept"),
    _now("updated_at"),
    Index(
        "ix_text_vectors_hnsw",
        "vector",
        postgresql_using="hnsw",
        postgresql_with={"m": 16, "ef_construction": 64},
        postgresql_ops={"vector": "vector_cosine_ops"},
    ),
    comment="Item texts as vectors; only changed texts are encoded again.",
)

item_vectors = Table(
    "item_vectors",
    metadata,
    Column("model_version", Text, primary_key=True),
    Column("item_id", Text, primary_key=True),
    Column("vector", HALFVEC, nullable=False),
    Column("text_hash", Text, nullable=False, comment="of the text vector it was made from"),
    postgresql_partition_by="LIST (model_version)",
    comment="Item vectors, a partition with its own index per model version.",
)

co_visitation = Table(
    "co_visitation",
    metadata,
    Column("item_id", Text, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("neighbour_id", Text, nullable=False),
    Column("score", Double, nullable=False),
    Column("people", Integer, nullable=False, comment="how many people had both"),
    comment="What people went on to after an item.",
)

popular_items = Table(
    "popular_items",
    metadata,
    Column("list", Text, primary_key=True, comment="all_time, trending (7 days) or fresh (newest arrivals)"),
    Column("rank", Integer, primary_key=True),
    Column("item_id", Text, nullable=False),
    Column("score", Double, nullable=False),
    comment="Lists that need no model.",
)

# --- scored ahead -------------------------------------------------------------------------------------------------

score_runs = Table(
    "score_runs",
    metadata,
    Column("run_id", BigInteger, Identity(always=True), primary_key=True),
    Column("model_version", Text, nullable=False),
    Column("candidates", Integer, nullable=False, comment="how many each person's list was chosen from"),
    Column("kept", Integer, nullable=False, comment="how many items a list has at most"),
    Column("started_at", Instant, nullable=False),
    Column("people", BigInteger, comment="lists written, by all its starts"),
    Column("seconds", Double, comment="the last start took"),
    Column("finished_at", Instant, comment="NULL: it was stopped, or is under way"),
    comment="Runs of `make score-all`. Where one stopped is read off the rows it wrote, so that no id is kept here.",
)

user_scores = Table(
    "user_scores",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("run_id", BigInteger, nullable=False, comment="of score_runs"),
    Column("model_version", Text, nullable=False),
    Column("scored_at", Instant, nullable=False, comment="the instant that the list is as of"),
    Column("item_ids", ARRAY(Text), nullable=False, comment="best first"),
    Column("scores", ARRAY(REAL), nullable=False, comment="the model's logits, in the same order"),
    comment="Everybody's list, scored ahead: what requests fall back on when no model can rank.",
)

# --- models ------------------------------------------------------------------------------------------------------

model_versions = Table(
    "model_versions",
    metadata,
    Column("version", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False, comment="below ARTIFACTS_URL"),
    Column("manifest", JSONB, nullable=False),
    _now("created_at"),
    comment="Artefacts, append-only.",
)
# Triggers (revision 0006) refuse to change or delete a row of it, or of the next table.

gate_records = Table(
    "gate_records",
    metadata,
    Column("version", Text, ForeignKey("model_versions.version"), primary_key=True),
    Column("passed", Boolean, nullable=False),
    Column("record", JSONB, nullable=False),
    _now("created_at"),
    UniqueConstraint("version", "passed"),
    comment="What a version had to prove, and whether it did.",
)

model_aliases = Table(
    "model_aliases",
    metadata,
    Column("alias", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("passed", Boolean, nullable=False, server_default=text("true")),
    Column("revision", BigInteger, nullable=False, server_default=text("1")),
    _now("updated_at"),
    CheckConstraint("passed", name="only_passed"),
    # An alias can point only at a version with a gate record that says passed: the database itself refuses others.
    ForeignKeyConstraint(["version", "passed"], ["gate_records.version", "gate_records.passed"]),
    # A trigger (revision 0006) refuses as well a version that lacks item vectors, and a revision that is not the next.
    comment="Which version serves; moved by compare-and-set on `revision`.",
)

# --- prompts -----------------------------------------------------------------------------------------------------

prompt_evaluations = Table(
    "prompt_evaluations",
    metadata,
    Column("evaluation_id", BigInteger, Identity(always=True), primary_key=True),
    Column("version", Text, nullable=False, comment="the template that was judged"),
    Column("kind", Text, nullable=False, comment="item, profile or wish"),
    Column(
        "conditions",
        Text,
        nullable=False,
        comment="hash of all else that decides the figures: only equal ones are compared",
    ),
    Column("figures", JSONB, nullable=False, comment="see orchestration/compute/prompt_evaluation.py"),
    _now("evaluated_at"),
    Index(None, "kind", "conditions"),
    comment="What each prompt template scored, append-only.",
)

prompt_winners = Table(
    "prompt_winners",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column(
        "evaluation_id",
        BigInteger,
        ForeignKey("prompt_evaluations.evaluation_id"),
        nullable=False,
        comment="the figures that decided",
    ),
    _now("chosen_at"),
    comment="Which version of each kind is used; no row: the default.",
)

# --- what was served ----------------------------------------------------------------------------------------------

served_requests = Table(
    "served_requests",
    metadata,
    Column("request_id", Text, primary_key=True, comment="what events that it led to carry"),
    Column("user_id", Text, nullable=False),
    Column("served_at", Instant, nullable=False),
    Column("wish_hash", Text, comment="keyed hash of the wish, equal for equal wishes; NULL: there was none"),
    Column("experiment", Text, comment="the experiment that has the person; NULL: none"),
    Column("arm", Text, comment="the arm they are in; where `degraded` says arm, they were not answered by it"),
    Column("arm_share", REAL, comment="the probability of that arm for whoever is in the experiment"),
    Column("model_version", Text, nullable=False, comment="what truly answered"),
    Column("prompt_version", Text, comment="the template that the wish was encoded by; NULL: no wish was followed"),
    Column("item_ids", ARRAY(Text), nullable=False, comment="what was shown, in order"),
    Column("scores", ARRAY(REAL), nullable=False, comment="theirs"),
    Column(
        "propensities",
        ARRAY(REAL),
        comment="the probability of each item shown at its place, given those before it; NULL: nothing was random",
    ),
    Column("candidate_ids", ARRAY(Text), comment="the best of what was ranked; of explored and of sampled requests"),
    Column("candidate_scores", ARRAY(REAL), comment="theirs"),
    Column("candidates", Integer, nullable=False, comment="how many were ranked"),
    Column("sources", JSONB, nullable=False, comment="how many of them came from each source"),
    Column("degraded", ARRAY(Text), nullable=False, comment="the rungs of the ladder that were taken"),
    Index(None, "served_at"),
    Index(None, "user_id"),
    Index(
        "ix_served_requests_experiment",
        "experiment",
        "served_at",
        postgresql_where=text("experiment IS NOT NULL"),
    ),
    comment="What each recommendation showed, and what made it; kept 90 days.",
)

shadow_requests = Table(
    "shadow_requests",
    metadata,
    Column("request_id", Text, primary_key=True, comment="the request that was answered otherwise"),
    Column("arm", Text, primary_key=True),
    Column("experiment", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("served_at", Instant, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("prompt_version", Text),
    Column("item_ids", ARRAY(Text), nullable=False, comment="what would have been shown, in order"),
    Column("scores", ARRAY(REAL), nullable=False),
    Column("candidates", Integer, nullable=False),
    Column("sources", JSONB, nullable=False),
    Column("degraded", ARRAY(Text), nullable=False),
    Index(None, "served_at"),
    Index(None, "user_id"),
    comment="What a shadow, an arm with share 0, would have shown: nobody saw it; kept 90 days.",
)

# --- skew audit ---------------------------------------------------------------------------------------------------

served_features = Table(
    "served_features",
    metadata,
    Column("read_id", Text, primary_key=True),
    Column("view", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("user_id", Text, nullable=False, comment="whom the request was for"),
    Column("read_at", Instant, nullable=False, comment="the instant of the read: what ages are counted to"),
    Column("seen", Text, comment="pg_snapshot of the statement that read: which transactions it saw"),
    Column("definition_hash", Text, nullable=False, comment="of the view's states and of what is made from them"),
    Column("partition_date", Date, comment="the newest partition fit to be read then; NULL: none"),
    Column("built_at", Instant, comment="when that partition had been built"),
    Column("built_seen", Text, comment="the ledger's `seen` of that build"),
    Column("built_by", BigInteger, comment="xmin of the ledger's row: tells whether the read saw that build"),
    Column("features", ARRAY(Text), nullable=False),
    Column("keys", ARRAY(Text), nullable=False, comment="one key after the other, all their columns"),
    Column("numbers", ARRAY(REAL), nullable=False, comment="a row per key as the ranker got it; NULL: missing"),
    Index(None, "read_at"),
    Index(None, "user_id"),
    comment="Feature vectors as they were served to a sample of people, for the skew audit; kept a few days.",
)

skew_audits = Table(
    "skew_audits",
    metadata,
    Column("audit_id", BigInteger, Identity(always=True), primary_key=True),
    _now("audited_at"),
    Column("since", Instant, nullable=False, comment="reads before it were not looked at"),
    Column("reads", BigInteger, nullable=False),
    Column("compared", BigInteger, nullable=False, comment="values that were recomputed"),
    Column("bugs", BigInteger, nullable=False, comment="values that nothing explains; above zero blocks a release"),
    Column("mismatches", JSONB, nullable=False, comment="by view, feature and cause; names nobody"),
    comment="What each skew audit found.",
)

# --- drift --------------------------------------------------------------------------------------------------------

drift_sketches = Table(
    "drift_sketches",
    metadata,
    Column("day", Date, primary_key=True, comment="the last day of the window"),
    Column("span_days", Integer, primary_key=True, comment="1 or 7"),
    Column("kind", Text, primary_key=True, comment="features, scores, categories, labels or calibration"),
    Column("name", Text, primary_key=True),
    Column("version", Text, primary_key=True, comment="definition or model; only equal ones are compared"),
    Column("clusters", BigInteger, nullable=False, comment="people or items it is of; from 100 on it is kept"),
    Column("body", JSONB, nullable=False, comment="quantiles, shares, or a mean and its error; of nobody alone"),
    comment="What was served in a day or a week, as distributions: what drift is measured against.",
)

# --- survey ------------------------------------------------------------------------------------------------------

survey_answers = Table(
    "survey_answers",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("request_id", Text, primary_key=True, comment="the list that was asked about"),
    Column("question", Text, primary_key=True),
    Column("answer", SmallInteger, nullable=False, comment="1 (not at all) to 5 (very much)"),
    _now("answered_at"),
    CheckConstraint("question IN ('satisfied', 'trust')", name="known_question"),
    CheckConstraint("answer BETWEEN 1 AND 5", name="in_range"),
    Index(None, "request_id"),
    comment="What people answered to the page's two questions. No events: they are about no item and enter no history.",
)

# --- erasure -----------------------------------------------------------------------------------------------------

erasure_key = Table(
    "erasure_key",
    metadata,
    Column("singleton", Boolean, primary_key=True, server_default=text("true")),
    Column(
        "inner_pad", LargeBinary, nullable=False, comment="the key XOR 0x36, 64 bytes: how HMAC's inner hash begins"
    ),
    Column(
        "outer_pad", LargeBinary, nullable=False, comment="the key XOR 0x5c, 64 bytes: how HMAC's outer hash begins"
    ),
    _now("created_at"),
    CheckConstraint("singleton", name="one_row"),
    comment="One row: the key of user_hash(), made with the database, never rotated and never copied out of it.",
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("user_hash", LargeBinary, primary_key=True, comment="user_hash(user_id): HMAC-SHA256 under erasure_key"),
    Column("user_chars", Integer, nullable=False, comment="length of the id, so that texts can be searched for it"),
    Column("forgotten_at", Instant, nullable=False, comment="events up to this moment are not taken again"),
    comment="Who was forgotten, without saying who.",
)

erasure_requests = Table(
    "erasure_requests",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False, unique=True),
    _now("requested_at"),
    comment="Who is to be forgotten. Such a person reads as unknown; the row goes with everything else of them.",
)

erasure_receipts = Table(
    "erasure_receipts",
    metadata,
    Column("receipt_id", Text, primary_key=True),
    Column("forgotten_at", Instant, nullable=False),
    Column("removed", JSONB, nullable=False, comment="rows by table, events of the lake, files"),
    Column("stale", JSONB, nullable=False, comment="partitions to rebuild, by view"),
    Column("pending_days", ARRAY(Date), nullable=False, server_default="{}", comment="days with files to delete"),
    Column("pending_artifacts", ARRAY(Text), nullable=False, server_default="{}", comment="files to delete"),
    Column("finished_at", Instant, comment="NULL: files wait to be deleted"),
    comment="What each erasure removed, and where. Names nobody; rows are never deleted, their number orders erasures.",
)

# --- what people decide ------------------------------------------------------------------------------------------

consents = Table(
    "consents",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("personalise", Boolean, nullable=False, comment="false: nothing of the person is read to answer them"),
    _now("decided_at"),
    comment="What people said to being personalised; who is not in it has said nothing, and the default holds.",
)

exports = Table(
    "exports",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False, unique=True),
    _now("requested_at"),
    Column("document", JSONB, comment="all that is held of the person; NULL: not made yet"),
    Column("ready_at", Instant, comment="when it was made"),
    comment="Exports that people asked for; a copy of what is held of them, so kept a few days only.",
)

# --- access ------------------------------------------------------------------------------------------------------

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True, comment="the part of a key that may be shown"),
    Column("name", Text, nullable=False, comment="who or what it was made for"),
    Column("secret_hash", LargeBinary, nullable=False, comment="SHA-256 of the secret part"),
    Column("scopes", ARRAY(Text), nullable=False, comment="recommend, write, admin"),
    Column("per_minute", Integer, nullable=False, comment="requests that each process answers in a minute"),
    _now("created_at"),
    Column("expires_at", Instant, comment="NULL: never"),
    Column("revoked_at", Instant, comment="NULL: good until it expires"),
    CheckConstraint("scopes <@ '{recommend,write,admin}'::text[] AND cardinality(scopes) > 0", name="known_scopes"),
    CheckConstraint("octet_length(secret_hash) = 32", name="is_a_hash"),
    CheckConstraint("per_minute > 0", name="some_requests"),
    comment="Keys that requests carry; the secret itself is kept nowhere.",
)
