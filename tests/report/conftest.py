"""Tests with the real weights of optional packages are collected where these are installed."""

from ditq.report import feature_distance, perceptual

collect_ignore = [] if perceptual.weights_path() else ["test_perceptual_weights.py"]
collect_ignore += [] if feature_distance.weights_path() else ["test_feature_weights.py"]
