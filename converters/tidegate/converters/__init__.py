"""Checkpoint to compressed bundle: quantisers, and one lowering of the walk per target."""
