"""A Ray Serve handle as `Replicas`: Ray's errors become ours, and closing an answer cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from tidegate.cloud.ray.backend import LostReplicaError
from tidegate.cloud.ray.messages import Ask, ModelFacts
from tidegate.cloud.ray.replica import Part
from tidegate.errors import CapacityError, ExecutionError, UnavailableError


class ServeReplicas:
    """The replicas behind a handle of `EngineDeployment`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def facts(self) -> ModelFacts:
        """Of the model, from any replica, once there is one."""
        found = await self._handle.facts.remote()
        assert isinstance(found, ModelFacts)
        return found

    async def numbers(self) -> Mapping[str, object]:
        """Of any replica."""
        found: Mapping[str, object] = await self._handle.numbers.remote()
        return found

    async def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
        """See `Replicas.answer`."""
        response: Any = self._streaming.answer.remote(ask)
        ended = False
        try:
            async for part in response:
                yield part
            ended = True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise LostReplicaError("the replica cancelled the call") from None
        except BackPressureError as error:
            ended = True
            wait_s = 1.0 if error.retry_after_s is None else error.retry_after_s
            message = "too many calls wait for a replica: try again later"
            raise CapacityError(message, retry_after_s=wait_s) from None
        except DeploymentUnavailableError:
            raise UnavailableError("the engines could not be started") from None
        except RayTaskError as error:
            # Ours were sent as a `Refusal`: this is a defect, whose text may quote the request.
            raise ExecutionError(f"a replica failed with {type(error.cause).__name__}") from None
        except (RayError, ReplicaUnavailableError, RequestCancelledError) as error:
            raise LostReplicaError(f"the replica is gone: {type(error).__name__}") from None
        finally:
            if not ended:
                response.cancel()
