"""Detectors of 3D boxes, and segmenters of images."""
