"""The OpenAI-compatible HTTP surface, the same on a device and in the cloud.

`schema` reads requests, `backend` says what serves them, `http` joins the two.
"""
