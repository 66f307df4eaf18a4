"""Export: a compressed graph -> ONNX -> an engine folder, its targets, and the loader."""
