"""The tests of ST-LPIPS with its real weights are collected where the optional package is installed."""

from ditq.report.perceptual import weights_path

collect_ignore = [] if weights_path() else ["test_perceptual_weights.py"]
