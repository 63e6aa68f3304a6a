"""Prompt to tokens: requests, the pure scheduler, the KV cache, sampling, text, the engine loop.

The same engine runs on a device and in the cloud; only its `executor.Executor` differs.
"""
