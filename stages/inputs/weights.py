"""Published weights: a folder with model.safetensors and config.json, the dict that the model is built from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from config.sections import ImportParams, PartStart, TeacherStart
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.inherit import inherited
from stages.context import StageError
from training.loading import load_weights

logger = logging.getLogger(__name__)

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"

Model = TypeVar("Model", bound=nn.Module)
Starts = ImportParams | Sequence[TeacherStart | PartStart] | None


def save_detector(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write weights and config; equal input gives equal bytes (no time, path or revision inside)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_detector(folder: Path) -> Detector:
    """The published detector in evaluation mode, on the CPU.

    Raises:
        StageError: a file is missing or broken, or the weights are not exactly those of the model in config.json.
    """
    return load_published(folder, build_detector)[0]


def load_published(folder: Path, build: Callable[[dict[str, Any]], Model]) -> tuple[Model, dict[str, Any]]:
    """A published model in evaluation mode, on the CPU, and its config.json, which `build` makes it from.

    Raises:
        StageError: a file is missing or broken, or the weights are not exactly those of the model in config.json.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise StageError(
            f"{folder} does not hold a whole model ({error}): run the stage that trains it again"
        ) from error
    model = build(without_checkpoints(config))
    fill(model, weights, folder / WEIGHTS)
    return model.eval(), config


def start_as_set(
    detector: Detector, start: Starts, root: Path, parts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Give a detector the weights that it starts from, if it has any.

    Args:
        detector: gets the weights.
        start: as the parameters name them.
        root: of the project.
        parts: sensor -> the teacher that is this part of the detector.

    Raises:
        StageError: a start is not there, or does not fit.
    """
    if isinstance(start, ImportParams):
        start_from(detector, root / start.folder, start.checksum)
        return
    filled: dict[str, set[str]] = {}
    for each in start or ():
        teacher = parts[each.part] if isinstance(each, PartStart) else each.teacher
        folder = root / "outputs/teachers" / teacher
        if isinstance(each, TeacherStart) and each.only is None:
            start_from(detector, folder, None)
            filled[teacher] = set(detector.state_dict())
        else:
            filled[teacher] = start_in_part(detector, folder, each.only, resample=each.resample)
    if filled:
        new = sorted({name.rpartition(".")[0] for name in detector.state_dict().keys() - set().union(*filled.values())})
        counts = ", ".join(f"{len(names)} weights from {teacher}" for teacher, names in filled.items())
        logger.info("%s; new: %s", counts, ", ".join(new) or "nothing")


def start_from(model: nn.Module, folder: Path, checksum: str | None) -> None:
    """Give a model the weights of a published one of the same kind.

    Args:
        model: gets the weights.
        folder: of the published one.
        checksum: xxh3-128 of its model.safetensors: a start is part of a result, so another file is refused. None:
            the folder is an out of a stage, which DVC compares.

    Raises:
        StageError: the file is missing or broken, is another one, or does not fit.
    """
    fill(model, weights_of_start(folder, checksum), folder / WEIGHTS)


def start_in_part(
    detector: Detector, folder: Path, only: Collection[str] | None = None, *, resample: bool = False
) -> set[str]:
    """Give a detector what fits, by name and shape, of a published one of another kind.

    Args:
        detector: gets the weights, at the places that its `places` name.
        folder: of the published one.
        only: modules of the published one that are taken; None: all.
        resample: whether weights of another size are brought to the detector's (`models.inherit`).

    Returns:
        Names of the weights that were set.

    Raises:
        StageError: the file is not readable, has no module of `only` or one that does not fit whole, or nothing fits.
    """
    chosen = fitting(detector, weights_of_start(folder, None), folder / WEIGHTS, only, resample=resample)
    load_weights(detector, detector.state_dict() | chosen)
    return set(chosen)


def weights_of_start(folder: Path, checksum: str | None) -> dict[str, Tensor]:
    """The weights of a published model, by name.

    Raises:
        StageError: they cannot be read, or are not those of the checksum.
    """
    path = folder / WEIGHTS
    try:
        content = path.read_bytes()
        if checksum is not None and checksum != (found := checksum_of(content)):
            raise StageError(
                f"the start {path} has checksum {found}, the parameters say {checksum}: "
                "put back the file that was meant, or write the new checksum"
            )
        return load(content)
    except (OSError, SafetensorError) as error:
        raise StageError(f"the start {folder} has no readable weights ({error}): give a published model") from error


def fitting(
    detector: Detector,
    weights: Mapping[str, Tensor],
    source: Path | str,
    only: Collection[str] | None = None,
    *,
    resample: bool = False,
) -> dict[str, Tensor]:
    """What a detector would take of published weights, see `start_in_part`; both may be on the device meta.

    Args:
        detector: is left as it is.
        weights: of the published one.
        source: whose they are, for messages.
        only: modules of the published one that are taken; None: all.
        resample: whether weights of another size are brought to the detector's.

    Returns:
        By the names that the detector has for them.

    Raises:
        StageError: they have no module of `only` or one that does not fit whole, or nothing fits.
    """
    own, chosen = detector.state_dict(), dict[str, Tensor]()
    for module in only or sorted({name.partition(".")[0] for name in weights}):
        found = {
            place + name.removeprefix(module): weight
            for name, weight in weights.items()
            for place in detector.places.get(module, (module,))
            if name.startswith(f"{module}.")
        }
        if resample:
            found = _inherited(detector, module, found, source)
        fits = {name: w for name, w in found.items() if name in own and own[name].shape == w.shape}
        if only is not None and not fits:
            known = ", ".join(sorted({name.partition(".")[0] for name in weights}))
            raise StageError(
                f"{source}: nothing of module {module!r} fits the {type(detector).__name__}; it has {known}"
            )
        if only is not None and (others := found.keys() - fits.keys()):
            raise StageError(f"{source}: module {module!r} fits the {type(detector).__name__} but for {_some(others)}")
        chosen |= fits
    if not chosen:
        raise StageError(f"{source}: no weight of it fits the {type(detector).__name__}")
    return chosen


def _inherited(detector: Detector, module: str, found: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """Of a module's weights those that the detector has, at its sizes; it may have fewer layers, not more."""
    places = tuple(f"{place}." for place in detector.places.get(module, (module,)))
    wanted = [name for name in detector.state_dict() if name.startswith(places)]
    if more := set(wanted) - found.keys():
        raise StageError(f"{source}: module {module!r} lacks {_some(more)} of the {type(detector).__name__}")
    try:
        return {name: inherited(detector, name, found[name]) for name in wanted}
    except ValueError as error:
        raise StageError(f"{source}: {error}") from error


def checksum_of(content: bytes) -> str:
    """xxh3-128 of the bytes of a model.safetensors, as the parameters name it."""
    return xxhash.xxh3_128_hexdigest(content)


def fill(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Set all weights of a model, and nothing but them.

    Args:
        model: gets the weights.
        weights: by their names in the model.
        source: the file that they come from, for messages.

    Raises:
        StageError: naming what is missing, unused or of another shape.
    """
    check_fit(model, weights, source)
    load_weights(model, weights)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """See that weights are all those of a model, and nothing but them.

    Raises:
        StageError: naming what is missing, unused or of another shape.
    """
    expected = model.state_dict()
    _check_names(source, set(expected) - set(weights), set(weights) - set(expected))
    _check_shapes(source, expected, weights)


def without_checkpoints(config: Any) -> Any:
    """The config without `init_cfg`: every weight is about to be replaced, so no pretrained file need be there."""
    if isinstance(config, dict):
        return {key: without_checkpoints(value) for key, value in config.items() if key != "init_cfg"}
    return [without_checkpoints(value) for value in config] if isinstance(config, list) else config


def _check_names(source: Path | str, missing: set[str], unused: set[str]) -> None:
    if missing or unused:
        raise StageError(f"{source} does not fit the model: missing {_some(missing)}; unused {_some(unused)}")


def _check_shapes(source: Path | str, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} is {list(weights[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise StageError(f"{source} does not fit the model: {'; '.join(wrong[:10])}")


def _some(names: Collection[str], most: int = 10) -> str:
    listed = ", ".join(sorted(names)[:most]) or "nothing"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
