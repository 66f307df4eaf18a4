"""ONNX Runtime's providers for NVIDIA GPUs: which of them is here, which one runs a graph, and how, on torch's tensors."""
