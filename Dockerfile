# syntax=docker/dockerfile:1
# One binary for every part of Galerne, on a base that has the C library and nothing to log in to.
#   docker build -t galerne .                       with NCCL, for groups of several GPUs
#   docker build -t galerne:cpu --target cpu .      without: 247 MB less
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-pip \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /galerne
COPY .ci .ci
# The compilers of gRPC descriptions and of kernels for GPUs.
RUN .ci/setup cuda
COPY . .
ENV PROTOC=/galerne/.cache/bin/protoc CUDA_HOME=/galerne/.cache/cuda/nvidia/cu13
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/galerne/target \
    cargo build --profile dist --locked --bin galerne \
 && install target/dist/galerne /usr/local/bin/galerne

FROM build AS nccl
RUN python3 -m pip download --no-deps --dest /tmp nvidia-nccl-cu13==2.30.3 \
 && python3 -m zipfile -e /tmp/nvidia_nccl_cu13-*.whl /nccl

# The same Debian as above: the binary wants no newer C library than it was linked with.
FROM gcr.io/distroless/cc-debian12:nonroot AS cpu
LABEL org.opencontainers.image.title="galerne" \
      org.opencontainers.image.description="Mistral 7B and its kin, served by tensor-parallel groups" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /usr/local/bin/galerne /usr/local/bin/galerne
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/galerne"]

# The driver and its library come from the node, with the device.
FROM cpu
COPY --from=nccl /nccl/nvidia/nccl/lib/libnccl.so.2 /usr/local/lib/galerne/
ENV LD_LIBRARY_PATH=/usr/local/lib/galerne NVIDIA_DRIVER_CAPABILITIES=compute,utility
