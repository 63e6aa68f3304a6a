"""Paged attention over a ragged step: prefill, chunks, decode and checks of guesses alike."""
