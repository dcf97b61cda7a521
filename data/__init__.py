"""Sensor files to tensors, in rooms: reading, preparing, scoring, drawing, store, city."""
