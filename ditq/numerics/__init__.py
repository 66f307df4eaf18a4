"""Numerics: pure functions on tensors. Nothing in this folder knows a module, a model or a file format."""
