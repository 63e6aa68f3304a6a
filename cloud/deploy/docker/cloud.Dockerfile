# syntax=docker/dockerfile:1
# The cloud service. From the repository's root:
#   docker build -f cloud/deploy/docker/cloud.Dockerfile -t tidegate-cloud:0.1.0 .
# EXTRA=gpu for NVIDIA GPUs: torch's wheels bring CUDA, the node brings the driver.
ARG PYTHON=3.11.14-slim-bookworm
ARG EXTRA=cloud

FROM python:${PYTHON} AS build
ARG EXTRA
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY runtime ./runtime
COPY edge ./edge
COPY cloud ./cloud
COPY kernels ./kernels
COPY converters ./converters
COPY firmware-profiles ./firmware-profiles
COPY sdk ./sdk
RUN python -m venv /opt/tidegate \
    && /opt/tidegate/bin/pip install -c constraints.txt ".[${EXTRA}]"

FROM python:${PYTHON}
ARG EXTRA
# Triton compiles C against Python's headers when it first runs a kernel; the image has the headers.
# Debian keeps one version of a package at a time, so there is none to pin.
# hadolint ignore=DL3008
RUN if [ "${EXTRA}" = gpu ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/tidegate /opt/tidegate
ENV PATH=/opt/tidegate/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
RUN useradd --system --uid 10001 --user-group --no-create-home tidegate
USER 10001:10001
WORKDIR /tmp
EXPOSE 8090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8090/health', timeout=4)"]
ENTRYPOINT ["tidegate"]
CMD ["cloud", "--help"]
