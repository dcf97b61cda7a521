"""Sensor files to batches of tensors."""
