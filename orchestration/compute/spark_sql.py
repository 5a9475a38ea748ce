"""The SQL of windows.py for Spark: carried over by sqlglot, with the few places mended where equal words mean less.

Whatever Spark would refuse or silently read otherwise is refused here, before a cluster is asked for anything.
"""

from __future__ import annotations

import re

import sqlglot
from sqlglot import ErrorLevel, exp
from sqlglot.errors import SqlglotError

from orchestration.compute.windows import snapshot_sql, tile_sql
from schemas.errors import DefinitionError
from schemas.features import FeatureView


def compile_view(view: FeatureView) -> tuple[str, str]:
    """The Spark statements of `view`: its tiles, and its snapshot from the relations `tiles` and `days`."""
    return to_spark(tile_sql(view), f"tiles of {view.name}"), to_spark(
        snapshot_sql(view, "days"), f"snapshot of {view.name}"
    )


def to_spark(sql: str, what: str) -> str:
    """The DuckDB statement `sql` for Spark. Raises DefinitionError that names `what` and the piece that cannot be carried."""
    try:
        tree = sqlglot.parse_one(sql, read="duckdb").transform(_mended).transform(_without_null)
        for node in tree.find_all(exp.Anonymous, exp.ArrayAgg, exp.Qualify):
            _refuse(node, what)
        return tree.sql(dialect="spark", unsupported_level=ErrorLevel.RAISE)
    except SqlglotError as error:
        # sqlglot underlines the place for a terminal.
        raise _refused(what, re.sub(r"\x1b\[\d*m", "", str(error)), sql) from error


def _mended(node: exp.Expression) -> exp.Expression:
    if isinstance(node, exp.Extract) and node.name.upper() == "EPOCH":
        # Spark's EXTRACT knows no epoch. Instants are whole microseconds in both engines.
        micros = exp.func("UNIX_MICROS", node.expression, dialect="spark")
        return exp.Div(this=micros, expression=exp.cast(exp.Literal.number(1_000_000), "double"))
    if isinstance(node, exp.Anonymous) and node.name.upper() == "ROW":
        return exp.Struct(expressions=node.expressions)
    return node


def _without_null(node: exp.Expression) -> exp.Expression:
    """DuckDB's arg_max passes over rows whose value is NULL, Spark's max_by takes them."""
    if not isinstance(node, exp.ArgMax | exp.ArgMin):
        return node
    present = exp.Not(this=exp.Is(this=node.this.copy(), expression=exp.Null()))
    if isinstance(node.parent, exp.Filter):
        where = node.parent.expression
        where.set("this", exp.and_(where.this, present))
        return node
    return exp.Filter(this=node.copy(), expression=exp.Where(this=present))


def _refuse(node: exp.Expr, what: str) -> None:
    """Raise for what sqlglot writes down for Spark although Spark has no such thing, or another meaning of it."""
    if isinstance(node, exp.Anonymous) and node.name.upper() != "UNIX_MICROS":
        raise _refused(what, f"the function {node.name} has no known counterpart", node.sql("duckdb"))
    if isinstance(node, exp.ArrayAgg) and node.find(exp.Order):
        raise _refused(what, "Spark's collect_list takes no order", node.sql("duckdb"))
    if isinstance(node, exp.Qualify):
        raise _refused(what, "Spark has no QUALIFY", node.sql("duckdb"))


def _refused(what: str, why: str, sql: str) -> DefinitionError:
    return DefinitionError(
        f"the SQL for {what} cannot be carried to Spark: {why}; in {sql[:300]!r}. Write the state in schemas/features.py in "
        "words that both engines know, teach orchestration/compute/spark_sql.py the difference, or set LARDER_ENGINE=duckdb"
    )
