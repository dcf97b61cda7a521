"""Sensor files to tensors: nuScenes index, dataset, augmentation, teacher-output store, synthetic city."""
