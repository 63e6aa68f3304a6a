"""Settings of a service on Ray: the same as of one process, and how many of each part there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tidegate.api.tls import TlsFiles
from tidegate.cloud.access_settings import AccessSettings
from tidegate.cloud.executor_choice import ExecutorSettings
from tidegate.cloud.link_front import GatewaySettings
from tidegate.cloud.ray.affinity import ANCHOR_BLOCKS, SLACK
from tidegate.errors import ConfigError

_TORCH_ROWS, _GPU_ROWS = 8, 256
"""What the executors take by default, see `tidegate.cloud.executor_choice`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSettings:
    """How many replicas there are, and when there are more.

    Raises:
        ConfigError: a number is out of range.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing: float | None = None
    """Requests of one replica that it is scaled to; None for three quarters of a step's rows."""
    most_queued: int = 512
    """Calls that may wait in each front; more are refused with 429."""
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 120.0
    look_back_s: float = 10.0
    """What the mean of ongoing requests is taken over."""
    cpus: float = 1.0
    gpus: float = 0.0
    """Of each replica."""
    anchor_blocks: int = ANCHOR_BLOCKS
    """See `tidegate.cloud.ray.affinity`, like the next."""
    slack: int = SLACK

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            allowed = f"from 1 to max_replicas, {self.max_replicas}"
            raise ConfigError("min_replicas", self.min_replicas, allowed)
        for name in ("most_queued", "look_back_s", "anchor_blocks"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "above 0")
        if self.target_ongoing is not None and not self.target_ongoing > 0:
            raise ConfigError("target_ongoing", self.target_ongoing, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RaySettings:
    """One service on a cluster.

    Raises:
        ConfigError: fronts could not count limits together.
    """

    model: Path
    """A checkpoint's or a bundle's folder, which every node has under this name."""
    model_id: str
    host: str = "127.0.0.1"
    port: int = 8090
    fronts: int = 1
    """Processes that take HTTP calls apart and ask replicas."""
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    api_key_hashes: tuple[str, ...] = ()
    access: AccessSettings | None = None
    gateway: GatewaySettings | None = None
    drain_s: float = 30.0
    trusted: frozenset[str] | None = None
    """Public keys of which one must have signed a bundle; None for any or none."""
    tls: TlsFiles | None = None
    """Read when Ray's HTTP proxies start, and not again."""
    vllm_metrics: bool = True
    """Show metrics under vLLM's names, too."""

    def __post_init__(self) -> None:
        if self.fronts < 1:
            raise ConfigError("fronts", self.fronts, "at least 1")
        if self.fronts > 1 and self.access is not None and self.access.redis is None:
            raise ConfigError("fronts", self.fronts, "1, or with --limits-redis to count together")
        if self.tls is not None and self.tls.client_ca is not None:
            # Ray's proxies would take a certificate, but would not ask for one.
            allowed = "absent: Ray's proxies do not refuse clients that show no certificate"
            raise ConfigError("tls-client-ca", str(self.tls.client_ca), allowed)

    @property
    def rows(self) -> int:
        """Requests of one step of a replica."""
        return self.executor.rows or (_GPU_ROWS if self.scale.gpus else _TORCH_ROWS)

    @property
    def most_ongoing(self) -> int:
        """Requests that a replica is given: as many again as run wait in it, and none for long."""
        return 2 * self.rows

    @property
    def target_ongoing(self) -> float:
        """See `ScaleSettings.target_ongoing`."""
        return self.scale.target_ongoing or 0.75 * self.rows
