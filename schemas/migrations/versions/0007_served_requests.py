"""what every recommendation showed, and what shadows would have shown"""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('served_requests',
    sa.Column('request_id', sa.Text(), nullable=False, comment='what events that it led to carry'),
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('served_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('wish_hash', sa.Text(), nullable=True, comment='keyed hash of the wish, equal for equal wishes; NULL: there was none'),
    sa.Column('experiment', sa.Text(), nullable=True, comment='the experiment that has the person; NULL: none'),
    sa.Column('arm', sa.Text(), nullable=True, comment='the arm they are in; where `degraded` says arm, they were not answered by it'),
    sa.Column('arm_share', sa.REAL(), nullable=True, comment='the probability of that arm for whoever is in the experiment'),
    sa.Column('model_version', sa.Text(), nullable=False, comment='what truly answered'),
    sa.Column('prompt_version', sa.Text(), nullable=True, comment='the template that the wish was encoded by; NULL: no wish was followed'),
    sa.Column('item_ids', sa.ARRAY(sa.Text()), nullable=False, comment='what was shown, in order'),
    sa.Column('scores', sa.ARRAY(sa.REAL()), nullable=False, comment='theirs'),
    sa.Column('propensities', sa.ARRAY(sa.REAL()), nullable=True, comment='the probability of each item shown at its place, given those before it; NULL: nothing was random'),
    sa.Column('candidate_ids', sa.ARRAY(sa.Text()), nullable=True, comment='the best of what was ranked; of explored and of sampled requests'),
    sa.Column('candidate_scores', sa.ARRAY(sa.REAL()), nullable=True, comment='theirs'),
    sa.Column('candidates', sa.Integer(), nullable=False, comment='how many were ranked'),
    sa.Column('sources', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='how many of them came from each source'),
    sa.Column('degraded', sa.ARRAY(sa.Text()), nullable=False, comment='the rungs of the ladder that were taken'),
    sa.PrimaryKeyConstraint('request_id', name=op.f('pk_served_requests')),
    comment='What each recommendation showed, and what made it; kept 90 days.'
    )
    op.create_index(op.f('ix_served_requests_served_at'), 'served_requests', ['served_at'], unique=False)
    op.create_index(op.f('ix_served_requests_user_id'), 'served_requests', ['user_id'], unique=False)
    op.create_index('ix_served_requests_experiment', 'served_requests', ['experiment', 'served_at'], unique=False, postgresql_where=sa.text('experiment IS NOT NULL'))
    op.create_table('shadow_requests',
    sa.Column('request_id', sa.Text(), nullable=False, comment='the request that was answered otherwise'),
    sa.Column('arm', sa.Text(), nullable=False),
    sa.Column('experiment', sa.Text(), nullable=False),
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('served_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('model_version', sa.Text(), nullable=False),
    sa.Column('prompt_version', sa.Text(), nullable=True),
    sa.Column('item_ids', sa.ARRAY(sa.Text()), nullable=False, comment='what would have been shown, in order'),
    sa.Column('scores', sa.ARRAY(sa.REAL()), nullable=False),
    sa.Column('candidates', sa.Integer(), nullable=False),
    sa.Column('sources', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('degraded', sa.ARRAY(sa.Text()), nullable=False),
    sa.PrimaryKeyConstraint('request_id', 'arm', name=op.f('pk_shadow_requests')),
    comment='What a shadow, an arm with share 0, would have shown: nobody saw it; kept 90 days.'
    )
    op.create_index(op.f('ix_shadow_requests_served_at'), 'shadow_requests', ['served_at'], unique=False)
    op.create_index(op.f('ix_shadow_requests_user_id'), 'shadow_requests', ['user_id'], unique=False)


def downgrade() -> None:
    op.drop_table('shadow_requests')
    op.drop_table('served_requests')
