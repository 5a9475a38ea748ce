"""what people said to being personalised, the exports that they asked for; words about items by a language model"""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('consents',
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('personalise', sa.Boolean(), nullable=False, comment='false: nothing of the person is read to answer them'),
    sa.Column('decided_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('user_id', name=op.f('pk_consents')),
    comment='What people said to being personalised; who is not in it has said nothing, and the default holds.'
    )
    op.create_table('exports',
    sa.Column('request_id', sa.Text(), nullable=False),
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('requested_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('document', postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment='all that is held of the person; NULL: not made yet'),
    sa.Column('ready_at', sa.DateTime(timezone=True), nullable=True, comment='when it was made'),
    sa.PrimaryKeyConstraint('request_id', name=op.f('pk_exports')),
    sa.UniqueConstraint('user_id', name=op.f('uq_exports_user_id')),
    comment='Exports that people asked for; a copy of what is held of them, so kept a few days only.'
    )
    op.create_table('item_enrichments',
    sa.Column('item_id', sa.Text(), nullable=False),
    sa.Column('source_hash', sa.Text(), nullable=False, comment="of the item's text as it was sent, the template and the model"),
    sa.Column('about', sa.Text(), nullable=False, comment="encoded after the item's own description"),
    sa.Column('written_by', sa.Text(), nullable=False, comment='template and model'),
    sa.Column('written_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['item_id'], ['items.item_id'], name=op.f('fk_item_enrichments_item_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('item_id', name=op.f('pk_item_enrichments')),
    comment='A few words about items by a language model, where there is one.'
    )


def downgrade() -> None:
    op.execute("DROP FUNCTION IF EXISTS set_consent(text, boolean)")
    op.execute("DROP FUNCTION IF EXISTS without_consent(jsonb, boolean)")
    op.execute("DROP FUNCTION IF EXISTS request_export(text, text)")
    op.execute("DROP FUNCTION IF EXISTS read_export(text, text)")
    op.drop_table('item_enrichments')
    op.drop_table('exports')
    op.drop_table('consents')
