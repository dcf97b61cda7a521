"""Values that a training shows and does not minimise."""

from typing import Final

WATCHED: Final = "watch/"  # what the names of such values begin with
