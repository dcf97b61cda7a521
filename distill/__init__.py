"""Distillation: terms, their masks, adapters and distances, and the recipe that joins them."""

from distill.recipe import Recipe
from distill.term import Outcome, Term
from distill.terms import AdapterConfig, MaskConfig, TermConfig

__all__ = ["AdapterConfig", "MaskConfig", "Outcome", "Recipe", "Term", "TermConfig"]
