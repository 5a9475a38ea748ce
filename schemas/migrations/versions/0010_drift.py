"""drift: what was served in a day or a week, as distributions"""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('drift_sketches',
    sa.Column('day', sa.Date(), nullable=False, comment='the last day of the window'),
    sa.Column('span_days', sa.Integer(), nullable=False, comment='1 or 7'),
    sa.Column('kind', sa.Text(), nullable=False, comment='features, scores, categories, labels or calibration'),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('version', sa.Text(), nullable=False, comment='definition or model; only equal ones are compared'),
    sa.Column('clusters', sa.BigInteger(), nullable=False, comment='people or items it is of; from 100 on it is kept'),
    sa.Column('body', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='quantiles, shares, or a mean and its error; of nobody alone'),
    sa.PrimaryKeyConstraint('day', 'span_days', 'kind', 'name', 'version', name=op.f('pk_drift_sketches')),
    comment='What was served in a day or a week, as distributions: what drift is measured against.'
    )


def downgrade() -> None:
    op.drop_table('drift_sketches')
