"""A dataroot's tables to the index."""
