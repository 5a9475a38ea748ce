"""lists scored ahead for everybody, and the runs that made them"""

from alembic import op
import sqlalchemy as sa
revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('score_runs',
    sa.Column('run_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('model_version', sa.Text(), nullable=False),
    sa.Column('candidates', sa.Integer(), nullable=False, comment="how many each person's list was chosen from"),
    sa.Column('kept', sa.Integer(), nullable=False, comment='how many items a list has at most'),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('people', sa.BigInteger(), nullable=True, comment='lists written, by all its starts'),
    sa.Column('seconds', sa.Double(), nullable=True, comment='the last start took'),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True, comment='NULL: it was stopped, or is under way'),
    sa.PrimaryKeyConstraint('run_id', name=op.f('pk_score_runs')),
    comment='Runs of `make score-all`. Where one stopped is read off the rows it wrote, so that no id is kept here.'
    )
    op.create_table('user_scores',
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('run_id', sa.BigInteger(), nullable=False, comment='of score_runs'),
    sa.Column('model_version', sa.Text(), nullable=False),
    sa.Column('scored_at', sa.DateTime(timezone=True), nullable=False, comment='the instant that the list is as of'),
    sa.Column('item_ids', sa.ARRAY(sa.Text()), nullable=False, comment='best first'),
    sa.Column('scores', sa.ARRAY(sa.REAL()), nullable=False, comment="the model's logits, in the same order"),
    sa.PrimaryKeyConstraint('user_id', name=op.f('pk_user_scores')),
    comment='Everybody\'s list, scored ahead: what requests fall back on when no model can rank.'
    )


def downgrade() -> None:
    op.drop_table('user_scores')
    op.drop_table('score_runs')
