"""Calibration: prompts -> the denoiser's real inputs along real sampling trajectories -> statistics."""
