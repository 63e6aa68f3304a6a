"""Which weights to set to zero."""
