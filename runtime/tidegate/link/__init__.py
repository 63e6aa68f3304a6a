"""Device <-> cloud over a broker nobody has to trust.

Sealed envelopes, identity, durable outbox, request sessions and the MQTT transport. What it
promises, in order: only the two ends read or alter a request or its answer; an accepted request
is answered exactly once or reported as failed; a cut, spliced or replayed stream is noticed.
Import from the modules; nothing is re-exported here.
"""
