"""Tensors to tensors: detectors, layers and distillation losses. Knows no file, no DVC and no MLflow."""
