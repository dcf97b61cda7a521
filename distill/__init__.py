"""Distillation: terms, their masks, adapters and distances, and the recipe that joins them."""
