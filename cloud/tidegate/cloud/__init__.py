"""The service that takes the overflow: the engine on tensors, behind HTTP and the sealed link."""
