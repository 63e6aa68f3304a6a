"""Ray Serve's router by `tidegate.cloud.ray.affinity`: what it is told comes from Ray, no more."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tidegate.cloud.ray.affinity import SLACK, order
from tidegate.cloud.ray.messages import Ask


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Asks replicas in the order that a call's first tokens and their loads give.

    Ray takes the next one when one has as many requests as it may.
    """

    def initialize_state(self, slack: int = SLACK) -> None:
        """Take the settings of the deployment."""
        self._slack = slack

    async def choose_replicas(
        self,
        candidate_replicas: Sequence[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`: ranks of one replica each."""
        if pending_request is not None:
            # Wait longer each time that all are full.
            pending_request.routing_context.should_backoff = True
        ask = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(ask, Ask):
            # A question about the replica itself: any of them, over time all of them.
            return [[one] for one in random.sample(candidate_replicas, len(candidate_replicas))]
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        loads = {name: self._load(one) for name, one in by_name.items()}
        line = order(ask.anchor, loads, salt=ask.request_id.encode(), slack=self._slack)
        return [[by_name[name]] for name in line]

    def _load(self, replica: RunningReplica) -> int:
        """What this front knows from its own calls, or, where that is more, what replicas say."""
        own = self.replica_queue_len_cache.get(replica.replica_id) or 0
        told = replica.routing_stats or {}
        return max(own, int(told.get("running", 0)) + int(told.get("waiting", 0)))
