# syntax=docker/dockerfile:1

# One base for both stages. By digest: docs/operations.md, "Images by digest".
ARG PYTHON_IMAGE=python:3.13-slim

# ---- builder: the pinned packages into /venv, the code into /app. Nothing of this stage but the two goes on.
FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv /venv
COPY requirements/server.lock ./
# Every package is a wheel, so that there is no compiler to install; a source distribution is an error.
RUN /venv/bin/pip install --require-hashes --only-binary :all: --requirement server.lock
WORKDIR /app
COPY service ./service
COPY personae ./personae
COPY alembic ./alembic
COPY pyproject.toml ./
# Compiled once, here: the user of the image may not write, and a health check starts Python every few seconds.
RUN /venv/bin/python -m compileall -q --invalidation-mode unchecked-hash service personae alembic

# ---- the image
FROM ${PYTHON_IMAGE}
RUN groupadd --system --gid 10001 personae \
    && useradd --system --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin personae \
    # A volume that is mounted on one of these for the first time takes this owner over.
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/personae /var/lib/personae/keys \
        /var/lib/personae/ca /var/lib/personae/server /var/lib/personae/client
COPY --from=builder /venv /venv
COPY --from=builder /app /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
# Listens on loopback unless GRPC_HOST says otherwise, which takes a certificate (TLS_CERTIFICATE_FILE) or the word
# INSECURE_PLAINTEXT: the operator decides, not the image. The second port is for client certificates, where they
# are optional. The health check follows the same settings, with TLS too.
EXPOSE 50051 50052
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-m", "service", "health"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]
