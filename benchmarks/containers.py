"""Five ways to keep one array per sample on disk behind one interface, for `store_read.py`.

All hold the same bytes: float16 arrays of one shape, uncompressed. What is written together (a shard, a transaction)
is the same number of samples everywhere.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.store import Calibration, Encoding, Store, StoreIdentity, StoreWriter, TapSpec

Shape = tuple[int, int, int]
Half = NDArray[np.float16]


def sample_value(sample: int, shape: Shape) -> Half:
    """The array of a sample: noise that only its number fixes."""
    return np.random.default_rng(sample).standard_normal(shape, np.float32).astype(np.float16)


class Container(ABC):
    """A folder of arrays. Writing, opening and reading may each happen in a process of its own."""

    name: str

    def __init__(self, folder: Path, shape: Shape, shard: int) -> None:
        """Keep the settings; nothing is opened.

        Args:
            folder: of the container, which it has to itself.
            shape: of every array.
            shard: samples that are written together.
        """
        self.folder, self.shape, self.shard = folder, shape, shard

    @abstractmethod
    def write(self, values: Sequence[Half]) -> None:
        """Write the samples 0, 1, ... into a new folder."""

    def open(self) -> None:  # noqa: B027 (plain files have nothing to open)
        """What a process does once before it reads."""

    @abstractmethod
    def read(self, sample: int) -> Half:
        """The array of a sample; may be a view of a mapped file."""

    def parts(self, values: Sequence[Half]) -> list[Sequence[Half]]:
        """The values in the order of the samples, cut into shards."""
        return [values[i : i + self.shard] for i in range(0, len(values), self.shard)]


class PlainFiles(Container):
    """A raw file per sample: what an afternoon's script does, and the least that any other can cost."""

    name = "plain files"

    def write(self, values: Sequence[Half]) -> None:
        """See `Container`."""
        self.folder.mkdir(parents=True)
        for sample, value in enumerate(values):
            value.tofile(self._path(sample))

    def read(self, sample: int) -> Half:
        """See `Container`; a short file fails in the reshape."""
        return np.fromfile(self._path(sample), np.float16).reshape(self.shape)

    def _path(self, sample: int) -> Path:
        return self.folder / f"{sample:06d}.bin"


class Ours(Container):
    """`data.store`."""

    name = "ours"
    encoding = Encoding("float16")

    def write(self, values: Sequence[Half]) -> None:
        """See `Container`."""
        maps = [value.transpose(2, 0, 1) for value in values]  # as a teacher gives them
        identity = StoreIdentity("weights", "preprocessing", "index", "code", str(self.encoding))
        taps = {"map": TapSpec.dense(maps[0].shape, self.encoding, extent=51.2)}
        calibration = {"map": Calibration.fit(self.encoding, maps[:1])}
        tokens = [str(sample) for sample in range(len(maps))]
        with StoreWriter(self.folder, identity, taps, tokens, self.shard, calibration) as writer:
            for shard in writer.missing():
                writer.write(shard, ((token, {"map": maps[int(token)]}) for token in writer.shards[shard]))
            writer.finish()

    def open(self) -> None:
        """See `Container`."""
        self.store = Store.open(self.folder)

    def read(self, sample: int) -> Half:
        """See `Container`."""
        return self.store.read(str(sample), ["map"])["map"]


class Zarr(Container):
    """Zarr 3: one array [N, ...], a chunk per sample, many chunks in a file."""

    name = "Zarr 3, sharded"
    checked = False

    def write(self, values: Sequence[Half]) -> None:
        """See `Container`."""
        import zarr
        from zarr.codecs import Crc32cCodec

        array = zarr.create_array(
            self.folder,
            shape=(len(values), *self.shape),
            chunks=(1, *self.shape),
            shards=(self.shard, *self.shape),
            dtype="float16",
            compressors=[Crc32cCodec()] if self.checked else None,
        )
        for number, part in enumerate(self.parts(values)):
            array[number * self.shard : number * self.shard + len(part)] = np.stack(part)

    def open(self) -> None:
        """See `Container`."""
        import zarr

        self.array: Any = zarr.open_array(self.folder, mode="r")

    def read(self, sample: int) -> Half:
        """See `Container`."""
        value: Half = self.array[sample]
        return value


class ZarrChecked(Zarr):
    """Zarr with a CRC of every chunk; by default it has one of the shard's index only."""

    name = "Zarr 3, sharded, crc32c"
    checked = True


class Lmdb(Container):
    """LMDB: one memory-mapped B+ tree; values are read as views within a transaction that stays open."""

    name = "LMDB"

    def write(self, values: Sequence[Half]) -> None:
        """See `Container`."""
        import lmdb

        self.folder.mkdir(parents=True)
        room = sum(value.nbytes for value in values) * 2 + (64 << 20)
        with lmdb.open(str(self.folder), map_size=room) as environment:
            for number, part in enumerate(self.parts(values)):
                with environment.begin(write=True) as transaction:
                    for row, value in enumerate(part):
                        transaction.put(f"{number * self.shard + row:06d}".encode(), value.tobytes())

    def open(self) -> None:
        """See `Container`."""
        import lmdb

        environment = lmdb.open(str(self.folder), readonly=True, lock=False)
        self.transaction = environment.begin(buffers=True)

    def read(self, sample: int) -> Half:
        """See `Container`."""
        found = self.transaction.get(f"{sample:06d}".encode())
        if found is None:
            raise KeyError(f"LMDB has no sample {sample}")
        return np.frombuffer(found, np.float16).reshape(self.shape)


class Safetensors(Container):
    """A safetensors file per shard."""

    name = "safetensors"

    def write(self, values: Sequence[Half]) -> None:
        """See `Container`."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True)
        for number, part in enumerate(self.parts(values)):
            tensors = {str(number * self.shard + row): value for row, value in enumerate(part)}
            save_file(tensors, self.folder / f"{number:05d}.safetensors")

    def open(self) -> None:
        """See `Container`."""
        self.files: dict[int, Any] = {}

    def read(self, sample: int) -> Half:
        """See `Container`."""
        from safetensors import safe_open

        number = sample // self.shard
        if number not in self.files:
            self.files[number] = safe_open(self.folder / f"{number:05d}.safetensors", framework="np").__enter__()
        value: Half = self.files[number].get_tensor(str(sample))
        return value


CONTAINERS: tuple[type[Container], ...] = (PlainFiles, Ours, Zarr, ZarrChecked, Lmdb, Safetensors)
