"""Images that stay decoded between epochs, and between the two keyframes of a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray


class DecodedImages:
    """Network images by file and matrix; of more than `limit` the first that came goes, used since or not.

    Keyframes in their order ask for themselves and then for the one before: the last used would be the wrong ones to
    keep.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._images: dict[tuple[str, bytes], NDArray[Any]] = {}

    def get(self, file: str, matrix: NDArray[Any], decode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The image of a file under a matrix; decoded if it is not here. Callers must not write into it."""
        key = (file, matrix.tobytes())
        if key not in self._images:
            self._images[key] = decode()
            if len(self._images) > self.limit:
                del self._images[next(iter(self._images))]
        return self._images[key]
