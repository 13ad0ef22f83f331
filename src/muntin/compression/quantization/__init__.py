"""Quantisation: after training by calibration, and quantisation-aware training."""
