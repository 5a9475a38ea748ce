"""skew audit: vectors as served, which transaction stored an event, what audits found"""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None

THIS_TRANSACTION = '((pg_current_xact_id())::text)::bigint'


def upgrade() -> None:
    # In two steps: with a default from the start every row that is there would be said to be stored just now.
    op.add_column('recent_events', sa.Column('stored_by', sa.BigInteger(), nullable=True, comment='the transaction that stored it: tells which reads saw it; NULL: stored before this was kept'))
    op.execute(f"ALTER TABLE recent_events ALTER COLUMN stored_by SET DEFAULT {THIS_TRANSACTION}")
    op.add_column('feature_ledger', sa.Column('seen', sa.Text(), nullable=True, comment='pg_snapshot from before the lake was read: events of which transactions it may hold'))
    op.create_table('served_features',
    sa.Column('read_id', sa.Text(), nullable=False),
    sa.Column('view', sa.Text(), nullable=False),
    sa.Column('request_id', sa.Text(), nullable=False),
    sa.Column('user_id', sa.Text(), nullable=False, comment='whom the request was for'),
    sa.Column('read_at', sa.DateTime(timezone=True), nullable=False, comment='the instant of the read: what ages are counted to'),
    sa.Column('seen', sa.Text(), nullable=True, comment='pg_snapshot of the statement that read: which transactions it saw'),
    sa.Column('definition_hash', sa.Text(), nullable=False, comment="of the view's states and of what is made from them"),
    sa.Column('partition_date', sa.Date(), nullable=True, comment='the newest partition fit to be read then; NULL: none'),
    sa.Column('built_at', sa.DateTime(timezone=True), nullable=True, comment='when that partition had been built'),
    sa.Column('built_seen', sa.Text(), nullable=True, comment="the ledger's `seen` of that build"),
    sa.Column('built_by', sa.BigInteger(), nullable=True, comment="xmin of the ledger's row: tells whether the read saw that build"),
    sa.Column('features', sa.ARRAY(sa.Text()), nullable=False),
    sa.Column('keys', sa.ARRAY(sa.Text()), nullable=False, comment='one key after the other, all their columns'),
    sa.Column('numbers', sa.ARRAY(sa.REAL()), nullable=False, comment='a row per key as the ranker got it; NULL: missing'),
    sa.PrimaryKeyConstraint('read_id', 'view', name=op.f('pk_served_features')),
    comment='Feature vectors as they were served to a sample of people, for the skew audit; kept a few days.'
    )
    op.create_index(op.f('ix_served_features_read_at'), 'served_features', ['read_at'], unique=False)
    op.create_index(op.f('ix_served_features_user_id'), 'served_features', ['user_id'], unique=False)
    op.create_table('skew_audits',
    sa.Column('audit_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('audited_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('since', sa.DateTime(timezone=True), nullable=False, comment='reads before it were not looked at'),
    sa.Column('reads', sa.BigInteger(), nullable=False),
    sa.Column('compared', sa.BigInteger(), nullable=False, comment='values that were recomputed'),
    sa.Column('bugs', sa.BigInteger(), nullable=False, comment='values that nothing explains; above zero blocks a release'),
    sa.Column('mismatches', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='by view, feature and cause; names nobody'),
    sa.PrimaryKeyConstraint('audit_id', name=op.f('pk_skew_audits')),
    comment='What each skew audit found.'
    )


def downgrade() -> None:
    op.drop_table('skew_audits')
    op.drop_index(op.f('ix_served_features_user_id'), table_name='served_features')
    op.drop_index(op.f('ix_served_features_read_at'), table_name='served_features')
    op.drop_table('served_features')
    op.drop_column('feature_ledger', 'seen')
    op.drop_column('recent_events', 'stored_by')
