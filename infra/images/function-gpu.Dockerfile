# The function on an NVIDIA GPU (Cloud Run with an L4, or any host with driver 580 or newer). No cuDNN, no CUDA base image:
# the libraries come as wheels, and the driver from the host. The CPU answers until the GPU is warm.
#
#   docker build -f infra/images/function-gpu.Dockerfile -t larder-function-gpu .
#   docker build -f infra/images/function-gpu.Dockerfile --build-context baked=DIR -t larder-function-gpu .   (with a model)
#
# DIR is laid out as ARTIFACTS_URL; `python -m infra.deploy bake DIR` fills it. Without one the function fetches its model.

FROM scratch AS baked

FROM python:3.11.14-slim-bookworm AS package
WORKDIR /source
COPY pyproject.toml constraints.txt ./
COPY schemas schemas
COPY inference inference
COPY infra/__init__.py infra/terminal.py infra/package.py infra/
RUN python -m infra.package /opt/larder --extra function-gpu --python 3.11 --measure
COPY --from=baked / /opt/larder/artifacts/

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="larder function (GPU)" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin larder
COPY --from=package /opt/larder /opt/larder
COPY infra/images/start-function /usr/local/bin/start-function
COPY infra/images/healthy /usr/local/bin/healthy
ENV PYTHONPATH=/opt/larder \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LARDER_BAKED_ARTIFACTS=/opt/larder/artifacts \
    PORT=8080 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute
USER 10001
WORKDIR /tmp
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 CMD ["healthy"]
ENTRYPOINT ["start-function"]
