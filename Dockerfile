# One image for every role: `docker build -t loquetier .`, then `docker run loquetier gateway …`.
# RUNTIME has to hold cuBLASLt and NVRTC where the worker computes on a GPU; everything else runs
# on a bare Debian.
ARG RUNTIME=debian:trixie-slim

FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --release --locked --bin loquetier

FROM ${RUNTIME}
# The object store's certificate is verified with the system's.
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 loquetier \
    && install --directory --owner loquetier /home/loquetier/.cache
COPY --from=build /source/target/release/loquetier /usr/local/bin/loquetier
USER loquetier
WORKDIR /home/loquetier
ENTRYPOINT ["loquetier"]
CMD ["--help"]
