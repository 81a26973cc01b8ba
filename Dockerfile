# syntax=docker/dockerfile:1
# The kandle image.
#
#   docker build -t kandle .                                      for CPUs
#   docker build -t kandle:0.1.0-cuda --build-arg VARIANT=cuda .  for NVIDIA GPUs
#   docker buildx build --sbom=true --provenance=true …           with a software bill of materials
ARG VARIANT=cpu
ARG RUST=1.91
ARG CUDA=13.0.2

# Build image of each variant.
FROM rust:${RUST}-bookworm AS build-cpu
ENV FEATURES=""
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
ARG RUST
# Compute capability of the target GPU: 80 for A100, 89 for L4, 90 for H100.
ARG CUDA_COMPUTE_CAP=80
ENV FEATURES="cuda" CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP} PATH=/root/.cargo/bin:${PATH}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates curl perl pkg-config \
    && rm -rf /var/lib/apt/lists/* \
    && curl -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain "${RUST}"

# Compile the dependencies in a layer of their own, so that a change of the sources does not recompile them.
FROM build-${VARIANT} AS chef
RUN cargo install --locked cargo-chef@0.1.73
WORKDIR /kandle

FROM chef AS plan
COPY . .
RUN cargo chef prepare --recipe-path recipe.json

FROM chef AS build
COPY --from=plan /kandle/recipe.json recipe.json
RUN cargo chef cook --profile dist --locked --features "${FEATURES}" --recipe-path recipe.json
COPY . .
RUN cargo build --profile dist --locked --features "${FEATURES}" --bin kandle

# Runtime image of each variant.
FROM debian:bookworm-slim AS base-cpu
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS base-cuda
ARG CUDA
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The CUDA libraries that the binary links to; the driver comes from the node.
RUN short=$(echo "${CUDA}" | cut -d. -f1,2 | tr . -) \
    && apt-get update \
    && apt-get install -y --no-install-recommends "libcublas-${short}" "libcurand-${short}" \
    && rm -rf /var/lib/apt/lists/*

FROM base-${VARIANT}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kandle" \
      org.opencontainers.image.description="Batch inference for Kafka" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# CA certificates, to verify brokers and hubs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /var/cache/kandle && chown 65532:65532 /var/cache/kandle
COPY --from=build /kandle/target/dist/kandle /usr/local/bin/kandle
COPY LICENSE* /usr/share/doc/kandle/
ENV HF_HOME=/var/cache/kandle/huggingface XDG_CACHE_HOME=/var/cache/kandle
USER 65532:65532
EXPOSE 9464
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/kandle"]
CMD ["--help"]
