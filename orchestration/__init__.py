"""The Dagster code location and everything behind it."""

import os

# Before torch is loaded: its threads otherwise spin while they wait. With Postgres, or anybody else, on the same two
# cores, one training epoch then took forty times as long; waiting quietly costs nothing measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
