# syntax=docker/dockerfile:1
# One image for every part of Galerne: the binary, on a base that has the C library and nothing to log in to.
#   docker build -t galerne .
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /galerne
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/galerne/target \
    cargo build --profile dist --locked --bin galerne \
 && install target/dist/galerne /usr/local/bin/galerne

# The same Debian as above: the binary wants no newer C library than it was linked with.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="galerne" \
      org.opencontainers.image.description="Mistral 7B and its kin, served by tensor-parallel groups" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /usr/local/bin/galerne /usr/local/bin/galerne
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/galerne"]
