"""The OpenAI-compatible HTTP surface, the same on a device and in the cloud.

`schema` reads requests by `field_table`s, of which `openapi` makes the document, `backend` says
what serves them, `http` joins the two: `door` is what every request passes, `calls` serves one,
`answers` and `sse` are what goes back. `wire` is the same events as bytes for the link, `server`
puts an app on a port.
"""
