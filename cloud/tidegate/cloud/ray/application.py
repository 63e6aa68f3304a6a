"""The parts of a service as Ray Serve applications, and a cluster to run them on.

Ray's own ports take no password, so a cluster that is started here listens on loopback alone. Join
one on a private network with an address.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from tidegate.cloud.ray.deployments import EngineDeployment, FrontDeployment, GatewayDeployment
from tidegate.cloud.ray.router import PrefixRouter
from tidegate.cloud.ray.settings import RaySettings
from tidegate.errors import ConfigError

APPLICATION: Final = "tidegate"
GATEWAY: Final = "tidegate-gateway"
ENGINE: Final = "Engine"
_OBJECT_STORE_MIB: Final = 128
"""Calls and tokens are small and go from process to process without it."""
_RETRY_AFTER_S: Final = 1.0
_PART_CPUS: Final = 0.1
"""Of a front or a gateway, for Ray's placement; it limits nothing."""


def engines(settings: RaySettings, *, router: object = PrefixRouter) -> Any:
    """The deployment of engines, bound.

    Args:
        settings: of the service.
        router: Ray's request router, None for its own default.
    """
    scale = settings.scale
    routing: dict[str, object] = {"request_routing_stats_period_s": 1.0}
    if router is PrefixRouter:
        routing |= {"request_router_kwargs": {"slack": scale.slack}}
    if router is not None:
        routing |= {"request_router_class": router}
    return serve.deployment(
        name=ENGINE,
        max_ongoing_requests=settings.most_ongoing,
        max_queued_requests=scale.most_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            look_back_period_s=scale.look_back_s,
            metrics_interval_s=min(10.0, scale.look_back_s / 2),
        ),
        request_router_config=RequestRouterConfig(**routing),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=5.0,
        health_check_timeout_s=10.0,
    )(EngineDeployment).bind(settings)


def application(settings: RaySettings, *, router: object = PrefixRouter) -> Any:
    """HTTP and engines, for `serve.run`."""
    front = serve.deployment(
        name="Front",
        num_replicas=settings.fronts,
        max_ongoing_requests=settings.scale.most_queued + settings.most_ongoing,
        ray_actor_options={"num_cpus": _PART_CPUS},
        graceful_shutdown_timeout_s=settings.drain_s,
    )(serve.ingress()(FrontDeployment))
    return front.bind(settings, engines(settings, router=router))


def gateway(settings: RaySettings) -> Any:
    """The gateway alone: it finds the engines of the application by name."""
    handle = serve.get_deployment_handle(ENGINE, app_name=APPLICATION)
    made = serve.deployment(
        name="Gateway",
        num_replicas=1,  # a folder of keys has one user
        ray_actor_options={"num_cpus": _PART_CPUS},
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=5.0,
    )(GatewayDeployment)
    return made.bind(settings, handle)


@contextmanager
def cluster(*, address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or run one on loopback while the block does."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_MIB << 20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


def deploy(settings: RaySettings, *, router: object = PrefixRouter) -> str:
    """Run everything on the cluster that this process has joined; returns its URL.

    Raises:
        ConfigError: the port is taken.
    """
    host, port = settings.host, settings.port or _free_port(settings.host)
    try:
        serve.start(http_options={"host": host, "port": port, **_tls(settings)})
        serve.run(application(settings, router=router), name=APPLICATION, route_prefix="/")
        if settings.gateway is not None:
            serve.run(gateway(settings), name=GATEWAY, route_prefix=None)
    except RuntimeError as error:
        raise ConfigError(
            "ray", str(error)[:300], "a service that Ray can start; see its logs"
        ) from error
    scheme = "http" if settings.tls is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _tls(settings: RaySettings) -> dict[str, str]:
    if settings.tls is None:
        return {}
    files = settings.tls
    return {
        "ssl_certfile": str(files.certificate.resolve()),
        "ssl_keyfile": str(files.key.resolve()),
    }


def withdraw() -> None:
    """Drain and end what `deploy` started: gateways first, since they ask engines."""
    serve.delete(GATEWAY)
    serve.delete(APPLICATION)
    serve.shutdown()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
