"""The Dagster code location and everything behind it."""

import os
import warnings

from infra.terminal import end_with_one_line

end_with_one_line()

# Before torch is loaded: its threads otherwise spin while they wait. With Postgres, or anybody else, on the same two
# cores, one training epoch then took forty times as long; waiting quietly costs nothing measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Days are UTC days in every connection to Postgres: this wins over the server's zone and over a connection's options.
os.environ["PGTZ"] = "UTC"

# Said once for every asset at every start; Dagster's version is pinned, so nothing changes under us.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy` of function `asset` is currently in beta")
