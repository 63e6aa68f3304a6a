"""The device: executors, routing, energy, caches and the daemon around them."""
