"""answers to the two questions of the page
"""

from alembic import op
import sqlalchemy as sa
revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('survey_answers',
    sa.Column('user_id', sa.Text(), nullable=False),
    sa.Column('request_id', sa.Text(), nullable=False, comment='the list that was asked about'),
    sa.Column('question', sa.Text(), nullable=False),
    sa.Column('answer', sa.SmallInteger(), nullable=False, comment='1 (not at all) to 5 (very much)'),
    sa.Column('answered_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("question IN ('satisfied', 'trust')", name=op.f('ck_survey_answers_known_question')),
    sa.CheckConstraint('answer BETWEEN 1 AND 5', name=op.f('ck_survey_answers_in_range')),
    sa.PrimaryKeyConstraint('user_id', 'request_id', 'question', name=op.f('pk_survey_answers')),
    comment="What people answered to the page's two questions. No events: they are about no item and enter no history."
    )
    op.create_index(op.f('ix_survey_answers_request_id'), 'survey_answers', ['request_id'], unique=False)


def downgrade() -> None:
    op.drop_table('survey_answers')
