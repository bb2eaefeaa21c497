# syntax=docker/dockerfile:1
# The pipeline with its locked packages. torch's wheels bring CUDA 13, so that a slim Python is enough as a base; the
# host gives the driver (>= 580) through the NVIDIA container toolkit: `docker run --gpus all …`. It also runs without a GPU.
# Pin the base by digest with --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ARG UV_VERSION=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --disable-pip-version-check "uv==${UV_VERSION}" \
    && python -m venv --without-pip /opt/venv
COPY requirements.runtime.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes -r /build/requirements.runtime.lock
COPY pyproject.toml README.md /build/
COPY src /build/src
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --no-deps /build

FROM ${BASE} AS system
# git: DVC stands on it; `dvc exp run` commits, by a name that the repository's own settings replace. gcc and libc6-dev: Triton compiles its launchers when it runs. tini -g: signals reach the stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dspo \
    && mkdir /workspace /cache \
    && chmod 1777 /workspace /cache \
    && git config --system safe.directory /workspace \
    && git config --system user.name dspo \
    && git config --system user.email dspo@localhost
# All that is written outside /workspace goes to /cache or /tmp, so that the root file system can be read-only.
# USER answers for a --user that has no name. NVIDIA_VISIBLE_DEVICES is left to --gpus: set here, it could hand every
# GPU of a shared node to a container that asked for none. NVIDIA_REQUIRE_CUDA is left out: with it, the container
# would not start on an old driver, and the entrypoint could not say why.
ENV USER=dspo \
    DVC_SITE_CACHE_DIR=/cache/dvc \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace

# For .devcontainer alone, which makes a .venv of its own: what `make lint` and `make test` need of the system.
FROM system AS dev
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends chromium make openssh-client postgresql \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir /workspace/.venv \
    && chmod 1777 /workspace/.venv
ENV UV_CACHE_DIR=/cache/uv
USER 1000:1000

FROM system AS runtime
LABEL org.opencontainers.image.title="dspo" \
      org.opencontainers.image.description="Preference tuning of SDXL as one reproducible DVC pipeline" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=packages /opt/venv /opt/venv
COPY --chmod=755 container/entrypoint.sh /usr/local/bin/entrypoint
# HOME is writable for any --user. The workspace's code comes before the image's own.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache \
    PYTHONPATH=/workspace/src
USER 1000:1000
# DVC dies of TERM at once, with its locks held; at INT it waits for the stage, which gets it too, and lets them go.
STOPSIGNAL SIGINT
ENTRYPOINT ["tini", "-g", "--", "entrypoint"]
CMD ["dvc", "repro"]
