"""The cloud on Ray Serve: engines as replicas, HTTP and gateways in front of them. Optional."""
