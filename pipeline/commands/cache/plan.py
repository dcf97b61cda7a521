"""`cache plan`: the bytes and minutes that stores will take, here and for nuScenes trainval, before they are built."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from base.errors import PipelineError
from config.files import load_params
from config.params import Params
from config.sections import StoreParams
from data.store import TapSpec, mean_bytes, plan
from data.store.writer import readable
from models.detectors.build import build_detector
from pipeline.commands.cache.builds import STORES, actionable, builds, chosen, published, resumed_in, state
from pipeline.commands.cache.table import duration, table
from pipeline.stage import SCRATCH
from stages.calibration import calibrate, tap_specs
from stages.card import PROBES
from stages.extract import UNSEEN
from stages.inputs.segmenters import make_segmenter, segmenter_config
from stages.inputs.weights import save_detector
from stages.teaching.builds import BUILD
from stages.teaching.frozen import Frozen, Outputs, evenly, freeze

TRAINVAL: Final = 28_130  # training samples of nuScenes v1.0-trainval: Caesar et al., CVPR 2020, section 5
MEASURED: Final = 8  # samples that are timed and encoded, after one to warm up


@dataclass(frozen=True)
class TapCost:
    """What a tap takes; the figures are None where nothing of it is stored."""

    tap: str
    serve: str
    encoding: str
    bytes_per_sample: float | None = None  # mean of the measured samples
    bytes: int | None = None  # of the training split, as a build expects them: some more than the mean
    at_most: int | None = None
    trainval_bytes: int | None = None
    trainval_at_most: int | None = None

    @property
    def varies(self) -> bool:
        """Whether the bytes depend on what the teacher says."""
        return self.bytes is not None and self.bytes != self.at_most


@dataclass(frozen=True)
class StoreCost:
    """What a store takes."""

    store: str
    teacher: str
    trained: bool  # False: random weights stood in
    samples: int
    samples_per_second: float | None  # None: nothing of it is cached
    seconds: float  # a build of the whole store
    trainval_seconds: float
    to_write: int  # bytes that a build would still write; 0 for one that is current
    taps: list[TapCost]

    def total(self, figure: str) -> int:
        """Sum of a figure over the taps."""
        return sum(getattr(tap, figure) or 0 for tap in self.taps)


@actionable()
def run(root: Path, *, names: Sequence[str], as_json: bool) -> int:
    """Print the costs; 1 if what is still to be built is not expected to fit."""
    params = load_params(root)
    costs = [measure(root, params, name) for name in chosen(params, names)]
    free = _free(root)
    fits = sum(cost.to_write for cost in costs) <= free
    print(as_machines_read(costs, free, fits) if as_json else describe(costs, free, fits))
    return 0 if fits else 1


def measure(root: Path, params: Params, name: str) -> StoreCost:
    """Run a store's teacher on a few samples and encode what it says."""
    settings = params.stores[name]
    trained = (root / "outputs/teachers" / settings.teacher).exists()
    if not settings.cached:
        return StoreCost(name, settings.teacher, trained, 0, None, 0.0, 0.0, 0, _online(settings))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _weights(root, params, settings.teacher) as folder:
        teacher = freeze(root, params, settings, folder, device)
        samples, rate = _timed(teacher)
    specs = tap_specs(teacher, settings, next(iter(samples.values())))
    started = time.monotonic()
    means = mean_bytes(specs, calibrate(specs, samples), samples.items())
    rate = 1 / (1 / rate + (time.monotonic() - started) / len(samples))
    count = len(teacher.tokens)
    return StoreCost(
        name,
        settings.teacher,
        trained,
        count,
        rate,
        _passes(params, specs, count) / rate,
        _passes(params, specs, TRAINVAL) / rate,
        _to_write(root, params, name, specs, count, means),
        [*tap_costs(settings, specs, means, count), *_online(settings)],
    )


def tap_costs(
    settings: StoreParams, specs: Mapping[str, TapSpec], means: Mapping[str, float], samples: int
) -> list[TapCost]:
    """Bytes of the cached taps.

    Args:
        settings: of the store.
        specs: of its cached taps.
        means: measured bytes per sample.
        samples: of the training split.
    """
    costs = []
    for tap, spec in specs.items():
        here, trainval = (plan(Path.cwd(), {tap: spec}, count, means) for count in (samples, TRAINVAL))
        words = "exact" if spec.encoding is None else str(spec.encoding)
        bytes_ = (means[tap], here.sizes[tap], here.most, trainval.sizes[tap], trainval.most)
        costs.append(TapCost(tap, settings.taps[tap].serve, words, *bytes_))
    return costs


def describe(costs: Sequence[StoreCost], free: int, fits: bool) -> str:
    """The costs as a table and some lines."""
    if not costs:
        return "study.stores is empty: name a store of the parameters to plan it"
    return "\n".join([_table(costs), "", *_lines(costs), _verdict(costs, free, fits)])


def as_machines_read(costs: Sequence[StoreCost], free: int, fits: bool) -> str:
    """The same as JSON; bytes and seconds."""
    stores = [asdict(cost) for cost in costs]
    return json.dumps({"trainval_samples": TRAINVAL, "free": free, "fits": fits, "stores": stores}, indent=2)


def _table(costs: Sequence[StoreCost]) -> str:
    header = ["store", "tap", "serve", "encoding", "per sample", "expected", "at most", "trainval", "at most"]
    figures = ("bytes", "at_most", "trainval_bytes", "trainval_at_most")
    rows = []
    for cost in costs:
        for tap in cost.taps:
            if tap.bytes_per_sample is None:
                rows.append([cost.store, tap.tap, "online", tap.encoding, *[""] * 5])
                continue
            guess = "~" if tap.varies and not cost.trained else ""
            cells = [readable(value) for value in (tap.bytes_per_sample, *(getattr(tap, figure) for figure in figures))]
            marked = [cell if i in (2, 4) else guess + cell for i, cell in enumerate(cells)]
            rows.append([cost.store, tap.tap, tap.serve, tap.encoding, *marked])
    rows.append(["total", "", "", "", "", *(readable(sum(cost.total(figure) for cost in costs)) for figure in figures)])
    return table(header, rows, right={"per sample", "expected", "at most", "trainval"})


def _lines(costs: Sequence[StoreCost]) -> Iterator[str]:
    """Time of each store, and what is guessed."""
    for cost in costs:
        if cost.samples_per_second is not None:
            yield (
                f"{cost.store}: {cost.samples_per_second:.3g} samples/s here, so {duration(cost.seconds)} for "
                f"{cost.samples:,} samples, {duration(cost.trainval_seconds)} for the {TRAINVAL:,} of nuScenes trainval"
            )
    for teacher in dict.fromkeys(cost.teacher for cost in costs if not cost.trained and cost.samples_per_second):
        yield (
            f"~ teacher {teacher} is not trained yet, random weights stood in: what compression and empty cells save "
            "is a guess; `at most` is not"
        )


def _verdict(costs: Sequence[StoreCost], free: int, fits: bool) -> str:
    needed = sum(cost.to_write for cost in costs)
    if not needed:
        return f"nothing is to be built; {readable(free)} are free"
    if not fits:
        return (
            f"does not fit: {readable(needed)} are to be written and {readable(free)} are free: free space, "
            "keep fewer taps, or encode them smaller (dtype, channels, cells, compression)"
        )
    most = sum(cost.total("at_most") for cost in costs if cost.to_write)
    return f"fits: {readable(needed)} are to be written and {readable(free)} are free" + (
        f"; but {readable(most)}, the most that it can be, would not" if most > free else ""
    )


def _online(settings: StoreParams) -> list[TapCost]:
    return [TapCost(name, "online", "online, nothing stored") for name, tap in settings.taps.items() if not tap.cached]


def _timed(teacher: Frozen) -> tuple[dict[str, Outputs], float]:
    """Outputs of some samples by token, and samples per second without the first."""
    rows = evenly(1 + MEASURED, len(teacher.tokens))
    if not rows:
        raise PipelineError("data.splits.train has no samples in outputs/index: there is nothing to extract")
    stream = teacher.stream([rows[:1], rows[1:] or rows])
    token, first = next(stream)
    started = time.monotonic()
    samples = dict(stream)
    return {token: first, **samples}, len(samples) / (time.monotonic() - started)


def _passes(params: Params, specs: Mapping[str, TapSpec], samples: int) -> int:
    """How often the teacher runs for a store: per sample, for the calibration and for the card's gaps."""
    calibration = min(params.store.calibration_samples, samples) + min(UNSEEN, samples)
    gaps = params.store.gap_samples * len(PROBES) if any(not spec.ragged for spec in specs.values()) else 0
    return samples + calibration + gaps


def _to_write(
    root: Path, params: Params, name: str, specs: Mapping[str, TapSpec], samples: int, means: Mapping[str, float]
) -> int:
    """Bytes that the stage would still write."""
    if name in published(root) and state(root, params, name).kind == "current":
        return 0
    folder = root / SCRATCH
    if any(build.store == name for build in builds(root)) and (fingerprint := resumed_in(root, params, name)):
        folder = folder / f"extract-{name}" / fingerprint / BUILD
    return plan(folder, specs, samples, means).needed


def _free(root: Path) -> int:
    """Bytes that are free both where stores are built and where they are published."""
    tops = [next(path for path in (top, *top.parents) if path.exists()) for top in (root / SCRATCH, root / STORES)]
    return min(shutil.disk_usage(top).free for top in tops)


@contextmanager
def _weights(root: Path, params: Params, teacher: str) -> Iterator[Path]:
    """The folder of a teacher's weights; while it is not trained one with random weights."""
    folder = root / "outputs/teachers" / teacher
    if folder.exists():
        yield folder
        return
    torch.manual_seed(params.seed)
    section, build, config = _described(params, teacher)
    try:
        model = build(config)
    except (ValueError, ImportError) as error:
        raise PipelineError(f"{section}.{teacher}.model cannot be built: {error}") from error
    with tempfile.TemporaryDirectory() as made:
        save_detector(Path(made), config, model.state_dict())
        yield Path(made)


def _described(params: Params, teacher: str) -> tuple[str, Callable[[dict[str, Any]], nn.Module], dict[str, Any]]:
    """The section of a teacher in the parameters, what builds it, and from what."""
    if teacher in params.segmenters:
        return "segmenters", make_segmenter, segmenter_config(params.segmenters[teacher])
    return "teachers", build_detector, params.teachers[teacher].model
