# Dagster with the code location: one image for webserver, daemon and code server, which differ in their command only.
#
#   docker build -f infra/images/orchestration.Dockerfile -t larder-orchestration .

FROM python:3.11.14-slim-bookworm AS environment
WORKDIR /opt/larder
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch goes first, as in `make install`. `--build-arg PIP_EXTRA_INDEX_URL=…` may name an index with CPU builds, which are a
# tenth of the size; the rankers here train on CPUs.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --disable-pip-version-check torch==2.13.0
COPY schemas schemas
COPY inference inference
COPY infra infra
COPY orchestration orchestration
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[orchestration,deploy]'

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="larder orchestration" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin larder \
    && mkdir -p /opt/dagster/storage /var/lib/larder \
    && chown -R 10001:10001 /opt/dagster /var/lib/larder
COPY --from=environment /opt/venv /opt/venv
# Sources beside the installed package: `make deploy` packs the function from them.
COPY pyproject.toml constraints.txt /opt/larder/
COPY schemas /opt/larder/schemas
COPY inference /opt/larder/inference
COPY infra /opt/larder/infra
COPY orchestration /opt/larder/orchestration
COPY --chown=10001:10001 infra/dagster/production.yaml /opt/dagster/dagster.yaml
COPY infra/images/healthy /usr/local/bin/healthy
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/larder \
    PYTHONUNBUFFERED=1 \
    DAGSTER_HOME=/opt/dagster \
    DAGSTER_EVENT_BATCH_SIZE=100 \
    LARDER_HOME=/var/lib/larder \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /opt/larder
EXPOSE 3000 4000
STOPSIGNAL SIGINT
# The webserver's; compose.yaml gives daemon and code server their own.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=4 CMD ["healthy", "http://127.0.0.1:3000/server_info"]
CMD ["dagster-webserver", "--host", "0.0.0.0", "--port", "3000", "--workspace", "/opt/larder/infra/dagster/workspace.yaml"]
