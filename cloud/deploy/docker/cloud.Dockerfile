# syntax=docker/dockerfile:1
# The cloud service. From the repository's root:
#   docker build -f cloud/deploy/docker/cloud.Dockerfile -t tidegate-cloud:0.1.0 .
# EXTRA=gpu for NVIDIA GPUs: torch's wheels bring CUDA, the node brings the driver.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRA=cloud
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
