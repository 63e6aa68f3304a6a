"""Energy as a budget: what a board is, and what its modes, sensors and tokens cost."""
