# docker build -f manifests/operator.Dockerfile -t synthex-operator:dev .
FROM rust:1-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p synthex-operator --bin synthex-operator

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/synthex-operator /usr/local/bin/synthex-operator
USER 65532
ENTRYPOINT ["/usr/local/bin/synthex-operator"]
