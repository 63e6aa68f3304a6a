"""A home-and-workshop assistant: its corpus, its training and its two checkpoints."""
