"""The walk as ONNX graphs, in operators of ONNX Runtime."""
