"""Names of the values that a step of a training gives beside the losses of its model."""

from typing import Final

WATCHED: Final = "watch/"  # such values are shown and not minimised
DISTILLED: Final = "distill/"  # these are minimised beside the losses against the truth
