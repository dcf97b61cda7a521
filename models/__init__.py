"""Tensors to tensors: detectors and layers. Knows no file, no DVC and no MLflow."""
