#!/bin/sh
# Runs once, in an empty Postgres of compose.yaml: Dagster's own database, and the two roles that functions connect as.
# What they may do, migrations say.
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 --set password="$POSTGRES_PASSWORD" <<'SQL'
CREATE DATABASE dagster;
CREATE ROLE larder_function LOGIN PASSWORD :'password';
CREATE ROLE larder_writer LOGIN PASSWORD :'password';
SQL
