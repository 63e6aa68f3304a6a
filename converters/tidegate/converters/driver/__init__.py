"""Runs a recipe over a model, block by block, with everything that is finished on disk."""
