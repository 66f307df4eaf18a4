"""The ONNX forms that targets are put together from: weights, activations, transforms, attention."""
