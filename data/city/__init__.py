"""A synthetic city in nuScenes format, ray cast from meshes."""
