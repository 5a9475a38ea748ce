"""when the catalogue changed: what a process that keeps items in memory asks about
"""

from alembic import op
import sqlalchemy as sa
revision = '0012'
down_revision = '0011'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('catalogue_changes',
    sa.Column('change_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('changed_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('change_id', name=op.f('pk_catalogue_changes')),
    comment='That items, their vectors or their packed features were written to, told by triggers: a process that keeps items in memory asks whether this still reads as it did. What is older than an hour goes with the next.'
    )


def downgrade() -> None:
    op.drop_table('catalogue_changes')
    op.execute('DROP FUNCTION IF EXISTS public.note_catalogue_change() CASCADE')
