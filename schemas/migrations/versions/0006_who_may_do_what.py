"""request keys, and what the database itself refuses: changing what models were, serving one that is not complete

The four roles and their rights are no history but a declaration (schemas/roles.py), which every migration brings the
database to; see infra/roles.py.
"""

from alembic import op
import sqlalchemy as sa
revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None

REFUSE_CHANGE = """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% of table % is refused: its rows are what was built and judged, and stay as they were written',
            TG_OP, TG_TABLE_NAME USING ERRCODE = 'restrict_violation', HINT = 'register a new version instead';
    END $$
"""
# Not by a foreign key alone: that says nothing of vectors. A version is complete while every item that has a text vector
# has an item vector of it; without them the new model would not find those items.
CHECK_PROMOTION = """
    CREATE FUNCTION check_promotion() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
    DECLARE
        missing bigint;
    BEGIN
        IF TG_OP = 'UPDATE' AND NEW.revision <> OLD.revision + 1 THEN
            RAISE EXCEPTION 'alias % moves from revision % to %, not by one: another release came in between',
                NEW.alias, OLD.revision, NEW.revision
                USING ERRCODE = 'check_violation', CONSTRAINT = 'model_aliases_next_revision';
        END IF;
        IF NOT EXISTS (SELECT FROM gate_records AS g WHERE g.version = NEW.version AND g.passed) THEN
            RAISE EXCEPTION 'version % has no passed gate record, so the database refuses to let it serve', NEW.version
                USING ERRCODE = 'check_violation', CONSTRAINT = 'model_aliases_gate_passed';
        END IF;
        SELECT count(*) INTO missing FROM text_vectors AS t WHERE NOT EXISTS (
            SELECT FROM item_vectors AS v WHERE v.model_version = NEW.version AND v.item_id = t.item_id
        );
        IF missing > 0 THEN
            RAISE EXCEPTION 'version % lacks vectors for % items; materialise item_vectors, then release',
                NEW.version, missing USING ERRCODE = 'check_violation', CONSTRAINT = 'model_aliases_complete_vectors';
        END IF;
        RETURN NEW;
    END $$
"""


def upgrade() -> None:
    op.create_table('api_keys',
    sa.Column('key_id', sa.Text(), nullable=False, comment='the part of a key that may be shown'),
    sa.Column('name', sa.Text(), nullable=False, comment='who or what it was made for'),
    sa.Column('secret_hash', sa.LargeBinary(), nullable=False, comment='SHA-256 of the secret part'),
    sa.Column('scopes', sa.ARRAY(sa.Text()), nullable=False, comment='recommend, write, admin'),
    sa.Column('per_minute', sa.Integer(), nullable=False, comment='requests that each process answers in a minute'),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True, comment='NULL: never'),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True, comment='NULL: good until it expires'),
    sa.CheckConstraint("scopes <@ '{recommend,write,admin}'::text[] AND cardinality(scopes) > 0", name=op.f('ck_api_keys_known_scopes')),
    sa.CheckConstraint('octet_length(secret_hash) = 32', name=op.f('ck_api_keys_is_a_hash')),
    sa.CheckConstraint('per_minute > 0', name=op.f('ck_api_keys_some_requests')),
    sa.PrimaryKeyConstraint('key_id', name=op.f('pk_api_keys')),
    comment='Keys that requests carry; the secret itself is kept nowhere.'
    )
    op.execute(REFUSE_CHANGE)
    for table in ('model_versions', 'gate_records'):
        op.execute(f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()")
        op.execute(f"CREATE TRIGGER never_emptied BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")
    op.execute(CHECK_PROMOTION)
    op.execute("CREATE TRIGGER only_what_may_serve BEFORE INSERT OR UPDATE ON model_aliases FOR EACH ROW EXECUTE FUNCTION check_promotion()")
    # What the declared views keep online; who makes its tables need not be allowed to make schemas.
    op.execute("CREATE SCHEMA IF NOT EXISTS online")


def downgrade() -> None:
    op.execute("DROP TRIGGER only_what_may_serve ON model_aliases")
    op.execute("DROP FUNCTION check_promotion()")
    for table in ('model_versions', 'gate_records'):
        op.execute(f"DROP TRIGGER append_only ON {table}")
        op.execute(f"DROP TRIGGER never_emptied ON {table}")
    op.execute("DROP FUNCTION refuse_change()")
    op.drop_table('api_keys')
