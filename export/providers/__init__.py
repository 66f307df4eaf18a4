"""ONNX Runtime's providers for NVIDIA GPUs: which of them is here, which one runs a graph, and running it on torch's tensors."""
