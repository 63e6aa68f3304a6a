"""What runs a step of the model on a device: ONNX Runtime, OpenVINO."""
