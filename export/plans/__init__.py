"""TensorRT plans of an engine: built from its graph, kept in its folder by GPU kind and version, proven, run."""
