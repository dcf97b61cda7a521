"""Stage `extract`: run a frozen teacher once over the training split, publish its taps as a store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from data.batch import collate
from data.blobs import BlobError
from data.dataset import NuScenesDataset
from data.store import StoreError, StoreIdentity, StoreWriter, TapSpec, hash_files, plan
from models.detector import Detections, Detector
from pipeline.environment import cores
from pipeline.params import Params, TeacherParams
from pipeline.progress import ProgressBar
from pipeline.stage import StageContext, StageError
from pipeline.trainer import Preempted
from stages.inputs import INDEX, plain_dataset
from stages.weights import load_detector

logger = logging.getLogger(__name__)

BATCH: Final = 4  # samples; fixed, because rounding may depend on it
BOX_SIZE: Final = 11  # box, score, label
# The code that the contents of a store depend on. Of models, not the losses, which work on what is stored.
CODE: Final = (
    "stages/extract.py",
    "data/augment.py",
    "data/boxes.py",
    "data/dataset.py",
    "data/geometry.py",
    "data/sensors.py",
    "data/store/layout.py",
)

Outputs = dict[str, NDArray[Any]]


def run(context: StageContext) -> None:
    """Extract one entry of `teachers`."""
    if context.key not in context.params.teachers:
        raise StageError(f"teacher {context.key!r}: params.yaml has {', '.join(context.params.teachers)}")
    try:
        _extract(context, context.key, context.params.teachers[context.key])
    except (StoreError, BlobError) as error:
        raise StageError(str(error)) from error


def store_identity(root: Path, params: Params, teacher: str, weights: str | None = None) -> StoreIdentity:
    """The identity that a teacher's store must have now; `weights` stands in for a teacher that is not here."""
    settings = params.teachers[teacher]
    # At evaluation nothing else of `input` has an effect: a student's augmentation may change, its store stays.
    input_ = {"frames", "sweeps", "radar"}
    described = {
        "input": params.input.model_dump(include=input_) | {"size": params.input.image.size},
        "grid": params.grid.model_dump(),
        "split": params.data.splits.train,
        "taps": cached_taps(settings),
        "score_threshold": settings.score_threshold,
    }
    models = [str(path.relative_to(root)) for path in (root / "models").glob("*.py")]
    return StoreIdentity(
        weights=weights or hash_files(root, [f"outputs/teachers/{teacher}"]),
        preprocessing=xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode()),
        index=hash_files(root, [INDEX]),
        code=hash_files(root, [*CODE, *models]),
        dtype=params.store.dtype,
    )


def cached_taps(teacher: TeacherParams) -> list[str]:
    """Taps that the store holds."""
    return sorted(tap for tap, mode in teacher.taps.items() if mode != "online")


class Extractor:
    """A frozen teacher as a function from batches to arrays per sample."""

    def __init__(self, detector: Detector, taps: Sequence[str], score_threshold: float, device: torch.device) -> None:
        self.detector = detector.to(device).eval().requires_grad_(False)
        self.taps, self.score_threshold, self.device = list(taps), score_threshold, device

    def stream(self, dataset: NuScenesDataset, rows: Sequence[int]) -> Iterator[tuple[str, Outputs]]:
        """Token and outputs of samples, in the order of `rows`."""
        cuda = self.device.type == "cuda"
        workers = min(cores(), 8) if cuda else 0
        subset: Subset[Any] = Subset(dataset, rows)
        loader = DataLoader(subset, BATCH, collate_fn=collate, num_workers=workers, pin_memory=cuda)
        for batch in loader:
            yield from zip(batch.tokens, self(batch.to(self.device)), strict=True)

    @torch.inference_mode()
    def __call__(self, batch: Any) -> list[Outputs]:
        """Arrays of each sample of a batch."""
        prediction = self.detector(batch, self.taps)
        columns: dict[str, list[Tensor]] = {name: list(maps) for name, maps in prediction.taps.items()}
        if "boxes" in self.taps:
            columns["boxes"] = [self._rows(found) for found in self.detector.decode(prediction)]
        samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{name: value.cpu().numpy() for name, value in sample.items()} for sample in samples]

    def _rows(self, found: Detections) -> Tensor:
        """[K, 11]: box, score, label of what passes the threshold."""
        kept = found.scores >= self.score_threshold
        columns = (found.boxes, found.scores[:, None], found.labels[:, None])
        return torch.cat([column.float() for column in columns], dim=1)[kept]


def _extract(context: StageContext, key: str, teacher: TeacherParams) -> None:
    params, made = context.params, context.scratch / "store"
    detector = load_detector(context.root / f"outputs/teachers/{key}")
    extractor = Extractor(detector, cached_taps(teacher), teacher.score_threshold, context.device)
    dataset = plain_dataset(context.root, params, params.data.splits.train, detector)
    specs = _specs(extractor, dataset, params.store.dtype)
    planned = plan(made, specs, len(dataset))
    logger.info("plan: %s", planned)
    planned.check()
    writer = StoreWriter(
        made,
        store_identity(context.root, params, key),
        specs,
        dataset.tokens,
        params.store.shard_samples,
        rank=context.rank,
        world=context.world_size,
    )
    with writer, ProgressBar(context.spec.address, len(dataset), shown=context.rank == 0) as bar:
        _fill(writer, extractor, dataset, context, bar)
        _wait_for_all(context)
        if context.rank == 0:
            writer.finish()
    context.publish(made, f"outputs/stores/{key}")


def _specs(extractor: Extractor, dataset: NuScenesDataset, dtype: str) -> dict[str, TapSpec]:
    """Types and shapes, from the first sample. Boxes are kept exactly, dense maps in the store's type."""
    _, outputs = next(extractor.stream(dataset, [0]))
    dense = {name: TapSpec(dtype, value.shape) for name, value in outputs.items() if name != "boxes"}
    return {name: dense.get(name) or TapSpec("float32", (None, BOX_SIZE)) for name in outputs}


def _fill(
    writer: StoreWriter, extractor: Extractor, dataset: NuScenesDataset, context: StageContext, bar: ProgressBar
) -> None:
    """Write the shards that are missing; a stop loses the unfinished one."""
    rows = {token: row for row, token in enumerate(dataset.tokens)}
    missing = writer.missing()
    tokens = [token for shard in missing for token in writer.shards[shard]]
    bar.advance(by=len(dataset) - len(tokens))
    stream = _counted(extractor.stream(dataset, [rows[token] for token in tokens]), context, bar)
    for shard in missing:
        writer.write(shard, islice(stream, len(writer.shards[shard])))


def _counted(
    stream: Iterator[tuple[str, Outputs]], context: StageContext, bar: ProgressBar
) -> Iterator[tuple[str, Outputs]]:
    for number, output in enumerate(stream):
        if context.stop.is_set():
            raise Preempted(number)
        bar.advance()
        yield output


def _wait_for_all(context: StageContext) -> None:
    """Until every rank has written its shards."""
    if context.world_size > 1:
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
