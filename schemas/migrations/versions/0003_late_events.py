"""late events: every event id of the lake has a key, and the file before the current one is named"""

from alembic import op
import sqlalchemy as sa
revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None

KEYS_NOW = "Ids of all events, in the lake or on their way to it: what makes a repeated event change nothing."
KEYS_BEFORE = 'Ids of recent events: what makes a repeated event change nothing.'


def upgrade() -> None:
    # False for the days that are there: the next write to the lake reads their ids, once.
    op.add_column('lake_files', sa.Column('keyed', sa.Boolean(), server_default=sa.text('false'), nullable=False, comment='whether event_keys has the id of every event of the file'))
    op.add_column('lake_files', sa.Column('previous', sa.Text(), nullable=True, comment='the file before, kept for readers that began earlier'))
    op.create_table_comment('event_keys', KEYS_NOW, existing_comment=KEYS_BEFORE)


def downgrade() -> None:
    op.create_table_comment('event_keys', KEYS_BEFORE, existing_comment=KEYS_NOW)
    op.drop_column('lake_files', 'previous')
    op.drop_column('lake_files', 'keyed')
