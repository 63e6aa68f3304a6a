"""Settings of a service on Ray refuse what cannot work, and derive the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidegate.api.tls import TlsFiles
from tidegate.cloud.access_settings import AccessSettings
from tidegate.cloud.executor_choice import ExecutorSettings
from tidegate.cloud.ray.settings import RaySettings, ScaleSettings
from tidegate.errors import ConfigError


def settings(**fields: Any) -> RaySettings:
    return RaySettings(model=Path("model"), model_id="m", **fields)


def test_replicas_are_given_a_full_step_and_as_many_again() -> None:
    assert settings(executor=ExecutorSettings(rows=10)).most_ongoing == 20
    assert settings(executor=ExecutorSettings(rows=10)).target_ongoing == 7.5
    assert settings(scale=ScaleSettings(gpus=1)).most_ongoing == 512
    assert settings(scale=ScaleSettings(target_ongoing=3)).target_ongoing == 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas = 3"),
        ({"min_replicas": 0}, "min_replicas = 0"),
        ({"most_queued": 0}, "most_queued = 0"),
        ({"look_back_s": 0}, "look_back_s = 0"),
        ({"target_ongoing": -1}, "target_ongoing = -1"),
    ],
)
def test_a_wrong_scale_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ScaleSettings(**fields)


def test_a_promise_that_ray_does_not_keep_is_not_made() -> None:
    files = TlsFiles(certificate=Path("c"), key=Path("k"), client_ca=Path("ca"))
    with pytest.raises(ConfigError, match="tls-client-ca = 'ca'"):
        settings(tls=files)


def test_several_fronts_count_limits_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fronts = 2"):
        settings(fronts=2, access=AccessSettings(state=tmp_path))
    shared = AccessSettings(state=tmp_path, redis="redis://127.0.0.1/0")
    assert settings(fronts=2, access=shared).fronts == 2
