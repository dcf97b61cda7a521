"""Distillation terms and the recipes made of them."""
