"""prompt evaluations: what each template scored, and which version of each kind is used"""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('text_vectors', sa.Column('written_by', sa.Text(), nullable=True, comment='item template and encoder; NULL: from before this was kept'))
    op.alter_column('text_vectors', 'text_hash', comment='of the text as it was encoded, and of the encoder')
    op.create_table('prompt_evaluations',
    sa.Column('evaluation_id', sa.BigInteger(), sa.Identity(always=True), nullable=False),
    sa.Column('version', sa.Text(), nullable=False, comment='the template that was judged'),
    sa.Column('kind', sa.Text(), nullable=False, comment='item, profile or wish'),
    sa.Column('conditions', sa.Text(), nullable=False, comment='hash of all else that decides the figures: only equal ones are compared'),
    sa.Column('figures', postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment='see orchestration/compute/prompt_evaluation.py'),
    sa.Column('evaluated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('evaluation_id', name=op.f('pk_prompt_evaluations')),
    comment='What each prompt template scored, append-only.'
    )
    op.create_index(op.f('ix_prompt_evaluations_kind_conditions'), 'prompt_evaluations', ['kind', 'conditions'], unique=False)
    op.create_table('prompt_winners',
    sa.Column('kind', sa.Text(), nullable=False),
    sa.Column('version', sa.Text(), nullable=False),
    sa.Column('evaluation_id', sa.BigInteger(), nullable=False, comment='the figures that decided'),
    sa.Column('chosen_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['evaluation_id'], ['prompt_evaluations.evaluation_id'], name=op.f('fk_prompt_winners_evaluation_id')),
    sa.PrimaryKeyConstraint('kind', name=op.f('pk_prompt_winners')),
    comment='Which version of each kind is used; no row: the default.'
    )


def downgrade() -> None:
    op.drop_column('text_vectors', 'written_by')
    op.drop_table('prompt_winners')
    op.drop_index(op.f('ix_prompt_evaluations_kind_conditions'), table_name='prompt_evaluations')
    op.drop_table('prompt_evaluations')
