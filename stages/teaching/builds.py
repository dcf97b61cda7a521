"""Where an extraction keeps what it builds, in its scratch folder; apart from it, as commands need no models."""

from typing import Final

BUILD: Final = "store"  # the store that is being built
KEPT: Final = "kept"  # beside it: hard links to what was published
