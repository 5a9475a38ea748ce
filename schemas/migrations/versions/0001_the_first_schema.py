"""the first schema"""

from alembic import op
import sqlalchemy as sa
import pgvector.sqlalchemy
from sqlalchemy.dialects import postgresql
revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('co_visitation',
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('neighbour_id', sa.Text(), nullable=False),
    sa.Column('score', sa.Double(), nullable=False),
    sa.Column('people', sa.Integer(), nullable=False, comment='how many people had both'),
    sa.PrimaryKeyConstraint('item_id', 'rank', name=op.f('pk_co_visitation')),
    comment='What people went on to after an item.'
    )
    op.create_table('deployment',
    sa.Column('name', sa.Text(), nullable=False, comment='the deployment this database belongs to'),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_deployment')),
    comment='One row: a database serves one deployment.'
    )
    op.create_table('event_keys',
    sa.Column('event_id', sa.Text(), nullable=False),
    sa.Column('occurred_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('event_id', name=op.f('pk_event_keys')),
    comment='Ids of recent events: what makes a repeated event change nothing.'
    )
    op.create_table('feature_ledger',
    sa.Column('view', sa.Text(), nullable=False),
    sa.Column('partition_date', sa.Date(), nullable=False),
    sa.Column('definition_hash', sa.Text(), nullable=False),
    sa.Column('engine', sa.Text(), nullable=False),
    sa.Column('rows', sa.BigInteger(), nullable=False),
    sa.Column('events', sa.BigInteger(), nullable=False, comment='events of that day in the lake when it was built'),
    sa.Column('built_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('view', 'partition_date', name=op.f('pk_feature_ledger')),
    comment='Which partition of which view was built, from which definition; written with the data.'
    )
    op.create_table('ingests',
    sa.Column('ingest_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('fingerprint', sa.Text(), nullable=False),
    sa.Column('read_rows', sa.BigInteger(), nullable=False),
    sa.Column('stored_rows', sa.BigInteger(), nullable=False),
    sa.Column('duplicate_rows', sa.BigInteger(), nullable=False),
    sa.Column('quarantined_rows', sa.BigInteger(), nullable=False),
    sa.Column('items', sa.BigInteger(), nullable=False),
    sa.Column('people', sa.BigInteger(), nullable=False),
    sa.Column('finished_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('read_rows = stored_rows + duplicate_rows + quarantined_rows', name=op.f('ck_ingests_counts_add_up')),
    sa.PrimaryKeyConstraint('ingest_id', name=op.f('pk_ingests')),
    comment='Finished loads of a source; the counts add up by constraint.'
    )
    op.create_table('item_vectors',
    sa.Column('model_version', sa.Text(), nullable=False),
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('vector', pgvector.sqlalchemy.halfvec.HALFVEC(), nullable=False),
    sa.Column('text_hash', sa.Text(), nullable=False, comment='of the text vector it was made from'),
    sa.PrimaryKeyConstraint('model_version', 'item_id', name=op.f('pk_item_vectors')),
    comment='Item vectors, a partition with its own index per model version.',
    postgresql_partition_by='LIST (model_version)'
    )
    op.create_table('items',
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('title', sa.Text(), nullable=False),
    sa.Column('description', sa.Text(), server_default='', nullable=False),
    sa.Column('categories', sa.ARRAY(sa.Text()), server_default='{}', nullable=False),
    sa.Column('attributes', postgresql.JSONB(astext_type=sa.Text()), server_default='{}', nullable=False),
    sa.Column('available_at', sa.DateTime(timezone=True), nullable=True, comment='NULL: always been there'),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('item_id', name=op.f('pk_items')),
    comment='The catalogue.'
    )
    op.create_table('lake_files',
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('path', sa.Text(), nullable=False, comment='below LAKE_URL'),
    sa.Column('rows', sa.BigInteger(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.Column('written_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('day', name=op.f('pk_lake_files')),
    comment='The current Parquet file of each day: swapping this row is what makes a rewrite of a day atomic.'
    )
    op.create_table('model_versions',
    sa.Column('version', sa.Text(), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('path', sa.Text(), nullable=False, comment='below ARTIFACTS_URL'),
    sa.Column('manifest', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('version', name=op.f('pk_model_versions')),
    comment='Artefacts, append-only.'
    )
    op.create_table('people',
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('profile', postgresql.JSONB(astext_type=sa.Text()), server_default='{}', nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('user_id', name=op.f('pk_people')),
    comment='Profiles: what is known of a person besides events.'
    )
    op.create_table('popular_items',
    sa.Column('list', sa.Text(), nullable=False, comment='all_time, trending (7 days) or fresh (newest arrivals)'),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('score', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('list', 'rank', name=op.f('pk_popular_items')),
    comment='Lists that need no model.'
    )
    op.create_table('quarantine',
    sa.Column('quarantine_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('source', sa.Text(), nullable=False),
    sa.Column('file', sa.Text(), nullable=False),
    sa.Column('line', sa.BigInteger(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('row', sa.Text(), nullable=False),
    sa.Column('seen_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('quarantine_id', name=op.f('pk_quarantine')),
    sa.UniqueConstraint('source', 'file', 'line', 'reason', name=op.f('uq_quarantine_source_file_line_reason')),
    comment='Rows that could not be stored, where they were and why.'
    )
    op.create_table('recent_events',
    sa.Column('event_id', sa.Text(), nullable=False),
    sa.Column('occurred_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('value', sa.Double(), nullable=True),
    sa.Column('known_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('request_id', sa.Text(), nullable=True, comment='the recommendation that led to the event, if one did'),
    sa.Column('drained', sa.Boolean(), server_default=sa.text('false'), nullable=False, comment='true once the lake has it'),
    sa.PrimaryKeyConstraint('event_id', 'occurred_at', name=op.f('pk_recent_events')),
    comment='The last days of events, one partition a day: feeds feature heads and the drain into the lake.',
    postgresql_partition_by='RANGE (occurred_at)'
    )
    op.create_index(op.f('ix_recent_events_item_id_occurred_at'), 'recent_events', ['item_id', 'occurred_at'], unique=False)
    op.create_index('ix_recent_events_undrained', 'recent_events', ['occurred_at'], unique=False, postgresql_where=sa.text('NOT drained'))
    op.create_index(op.f('ix_recent_events_user_id_occurred_at'), 'recent_events', ['user_id', 'occurred_at'], unique=False)
    op.create_table('user_history',
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('occurred_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('event_id', sa.Text(), nullable=False),
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('value', sa.Double(), nullable=True),
    sa.PrimaryKeyConstraint('user_id', 'occurred_at', 'event_id', name=op.f('pk_user_history')),
    comment="Each person's last 200 events, whatever the windows and the retention."
    )
    op.create_table('gate_records',
    sa.Column('version', sa.Text(), nullable=False),
    sa.Column('passed', sa.Boolean(), nullable=False),
    sa.Column('record', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['version'], ['model_versions.version'], name=op.f('fk_gate_records_version')),
    sa.PrimaryKeyConstraint('version', name=op.f('pk_gate_records')),
    sa.UniqueConstraint('version', 'passed', name=op.f('uq_gate_records_version_passed')),
    comment='What a version had to prove, and whether it did.'
    )
    op.create_table('text_vectors',
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('text_hash', sa.Text(), nullable=False, comment='of the rendered text, its template and the encoder'),
    sa.Column('vector', pgvector.sqlalchemy.vector.VECTOR(dim=384), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.item_id'], name=op.f('fk_text_vectors_item_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('item_id', name=op.f('pk_text_vectors')),
    comment='Item texts as vectors; only changed texts are encoded again.'
    )
    op.create_index('ix_text_vectors_hnsw', 'text_vectors', ['vector'], unique=False, postgresql_using='hnsw', postgresql_with={'m': 16, 'ef_construction': 64}, postgresql_ops={'vector': 'vector_cosine_ops'})
    op.create_table('model_aliases',
    sa.Column('alias', sa.Text(), nullable=False),
    sa.Column('version', sa.Text(), nullable=False),
    sa.Column('passed', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('revision', sa.BigInteger(), server_default=sa.text('1'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('passed', name=op.f('ck_model_aliases_only_passed')),
    sa.ForeignKeyConstraint(['version', 'passed'], ['gate_records.version', 'gate_records.passed'], name=op.f('fk_model_aliases_version_passed')),
    sa.PrimaryKeyConstraint('alias', name=op.f('pk_model_aliases')),
    comment='Which version serves; moved by compare-and-set on `revision`.'
    )
    # Events of days without a partition of their own must never be refused.
    op.execute("CREATE TABLE recent_events_default PARTITION OF recent_events DEFAULT")
    # The tables of feature views are made from their declarations (orchestration/compute/materialise.py).
    op.execute("CREATE SCHEMA features")


def downgrade() -> None:
    op.execute("DROP SCHEMA features CASCADE")
    op.drop_table('model_aliases')
    op.drop_index('ix_text_vectors_hnsw', table_name='text_vectors', postgresql_using='hnsw', postgresql_with={'m': 16, 'ef_construction': 64}, postgresql_ops={'vector': 'vector_cosine_ops'})
    op.drop_table('text_vectors')
    op.drop_table('gate_records')
    op.drop_table('user_history')
    op.drop_index(op.f('ix_recent_events_user_id_occurred_at'), table_name='recent_events')
    op.drop_index('ix_recent_events_undrained', table_name='recent_events', postgresql_where=sa.text('NOT drained'))
    op.drop_index(op.f('ix_recent_events_item_id_occurred_at'), table_name='recent_events')
    op.drop_table('recent_events')
    op.drop_table('quarantine')
    op.drop_table('popular_items')
    op.drop_table('people')
    op.drop_table('model_versions')
    op.drop_table('lake_files')
    op.drop_table('items')
    op.drop_table('item_vectors')
    op.drop_table('ingests')
    op.drop_table('feature_ledger')
    op.drop_table('event_keys')
    op.drop_table('deployment')
    op.drop_table('co_visitation')
