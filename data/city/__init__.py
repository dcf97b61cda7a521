"""A synthetic city, ray cast and written as a nuScenes dataroot."""
