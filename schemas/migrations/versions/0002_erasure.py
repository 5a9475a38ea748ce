"""erasure: tombstones under a key of their own, requests, receipts, stale partitions"""

import secrets

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None

COUNTS_ADD_UP = 'read_rows = stored_rows + duplicate_rows + quarantined_rows'


def upgrade() -> None:
    op.add_column('feature_ledger', sa.Column('stale_at', sa.DateTime(timezone=True), nullable=True, comment='since when it holds what it should not; NULL: it does not. Still served until rebuilt'))
    op.add_column('ingests', sa.Column('forgotten_rows', sa.BigInteger(), server_default=sa.text('0'), nullable=False, comment='kept out: their people are forgotten'))
    op.drop_constraint('counts_add_up', 'ingests', type_='check')
    op.create_check_constraint('counts_add_up', 'ingests', f'{COUNTS_ADD_UP} + forgotten_rows')
    op.create_table('erasure_key',
    sa.Column('singleton', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('inner_pad', sa.LargeBinary(), nullable=False, comment="the key XOR 0x36, 64 bytes: how HMAC's inner hash begins"),
    sa.Column('outer_pad', sa.LargeBinary(), nullable=False, comment="the key XOR 0x5c, 64 bytes: how HMAC's outer hash begins"),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('singleton', name=op.f('ck_erasure_key_one_row')),
    sa.PrimaryKeyConstraint('singleton', name=op.f('pk_erasure_key')),
    comment='One row: the key of user_hash(), made with the database, never rotated and never copied out of it.'
    )
    op.create_table('tombstones',
    sa.Column('user_hash', sa.LargeBinary(), nullable=False, comment='user_hash(user_id): HMAC-SHA256 under erasure_key'),
    sa.Column('user_chars', sa.Integer(), nullable=False, comment='length of the id, so that texts can be searched for it'),
    sa.Column('forgotten_at', sa.DateTime(timezone=True), nullable=False, comment='events up to this moment are not taken again'),
    sa.PrimaryKeyConstraint('user_hash', name=op.f('pk_tombstones')),
    comment='Who was forgotten, without saying who.'
    )
    op.create_table('erasure_requests',
    sa.Column('request_id', sa.Text(), nullable=False),
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('requested_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('request_id', name=op.f('pk_erasure_requests')),
    sa.UniqueConstraint('user_id', name=op.f('uq_erasure_requests_user_id')),
    comment='Who is to be forgotten. Such a person reads as unknown; the row goes with everything else of them.'
    )
    op.create_table('erasure_receipts',
    sa.Column('receipt_id', sa.Text(), nullable=False),
    sa.Column('forgotten_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('removed', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='rows by table, events of the lake, files'),
    sa.Column('stale', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='partitions to rebuild, by view'),
    sa.Column('pending_days', sa.ARRAY(sa.Date()), server_default='{}', nullable=False, comment='days with files to delete'),
    sa.Column('pending_artifacts', sa.ARRAY(sa.Text()), server_default='{}', nullable=False, comment='files to delete'),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True, comment='NULL: files wait to be deleted'),
    sa.PrimaryKeyConstraint('receipt_id', name=op.f('pk_erasure_receipts')),
    comment='What each erasure removed, and where. Names nobody; rows are never deleted, their number orders erasures.'
    )
    # The key lies beside the tombstones on purpose: one backup holds both. A tombstone whose key was lost or rotated
    # blocks nothing, and the forgotten would come back with the next load.
    key = secrets.token_bytes(64)
    op.get_bind().execute(
        sa.text('INSERT INTO erasure_key (inner_pad, outer_pad) VALUES (:inner, :outer)'),
        {'inner': bytes(byte ^ 0x36 for byte in key), 'outer': bytes(byte ^ 0x5C for byte in key)},
    )
    # HMAC-SHA256 (RFC 2104) with what every server has; pgcrypto need not be installed.
    op.execute("""
        CREATE FUNCTION user_hash(user_id text) RETURNS bytea LANGUAGE sql STABLE STRICT PARALLEL SAFE AS $$
            SELECT sha256(outer_pad || sha256(inner_pad || convert_to(user_id, 'UTF8'))) FROM erasure_key
        $$
    """)


def downgrade() -> None:
    op.execute("DROP FUNCTION user_hash(text)")
    op.drop_table('erasure_receipts')
    op.drop_table('erasure_requests')
    op.drop_table('tombstones')
    op.drop_table('erasure_key')
    op.drop_constraint('counts_add_up', 'ingests', type_='check')
    op.execute("UPDATE ingests SET read_rows = read_rows - forgotten_rows")
    op.create_check_constraint('counts_add_up', 'ingests', COUNTS_ADD_UP)
    op.drop_column('ingests', 'forgotten_rows')
    op.drop_column('feature_ledger', 'stale_at')
