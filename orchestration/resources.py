"""What assets are given: this deployment's database, lake and artefacts, opened when first used."""

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import dagster as dg
import psycopg
from pydantic import PrivateAttr

from inference import artifacts
from infra import deployment as deployments
from infra import postgres
from infra.deployment import Deployment
from infra.feature_tables import ensure_view_tables
from orchestration.compute.engines import Engine
from orchestration.compute.lake import Lake
from orchestration.spark.launch import open_engine
from schemas.errors import SettingsError


class Larder(dg.ConfigurableResource):  # type: ignore[type-arg]  # its parameter is for Dagster's own use
    """The current deployment, or the one named `deployment`.

    `engine` and `spark_master` say what builds the feature views; empty, LARDER_ENGINE and LARDER_SPARK_MASTER do.
    """

    deployment: str = ""
    engine: str = ""
    spark_master: str = ""

    _url: str | None = PrivateAttr(default=None)

    @cached_property
    def record(self) -> Deployment:
        """Which deployment this is. Raises SettingsError if the named one was never run."""
        if not self.deployment:
            return deployments.current()
        found = deployments.load(self.deployment)
        if found is None:
            raise SettingsError(f"there is no deployment {self.deployment!r}; run `make run` first")
        return found

    @property
    def url(self) -> str:
        """The database's URL; on first use the server is started, migrated and given the views' tables."""
        if self._url is None:
            url = postgres.prepare(self.record)
            ensure_view_tables(url)
            self._url = url
        return self._url

    def connect(self) -> psycopg.Connection[Any]:
        """A new connection in UTC; use it as a context manager."""
        return psycopg.connect(self.url, options="-c TimeZone=UTC", application_name="larder-orchestration")

    @property
    def lake(self) -> Lake:
        return Lake(self.record.lake_url)

    def open_engine(self, context: dg.AssetExecutionContext) -> AbstractContextManager[Engine]:
        """What builds the feature views in this run. Entering it raises SettingsError if it is set to something unusable."""
        return open_engine(context, self.engine, self.spark_master)

    @property
    def artifacts_url(self) -> str:
        return self.record.artifacts_url

    def fetch(self, path: str) -> Any:
        """The local folder of the artefact at `path`."""
        return artifacts.fetch(self.artifacts_url, path)
