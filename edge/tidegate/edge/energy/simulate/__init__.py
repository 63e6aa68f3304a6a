"""A simulator of a device's days, with the daemon's own scheduler in it."""
