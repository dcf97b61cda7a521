"""Distillation: terms, their masks, adapters and distances, and the recipe that joins them."""

from models.distill.recipe import Recipe
from models.distill.term import Outcome, Term
from models.distill.terms import AdapterConfig, MaskConfig, TermConfig

__all__ = ["AdapterConfig", "MaskConfig", "Outcome", "Recipe", "Term", "TermConfig"]
