"""`export`: a published student of cameras or RADAR as ONNX and as a torch program, compared before it leaves."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from config.files import load_params
from config.params import Params
from data.preparing.build import RADAR_SWEEPS
from data.reading.batch import Batch, collate
from data.reading.index import RADARS
from models.detectors.camera import CameraDetector
from models.detectors.detector import Detector
from models.head.center_head import MAX_LOG_SIZE, GridCenterHead
from pipeline.commands.export_check import EAGER, TOLERANCE, Difference, Maps, Runner, compare, latencies_ms
from stages.context import StageError, publish
from stages.cost import parameters_of
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import WEIGHTS, checksum_of, load_detector

EXPORTS: Final = Path("outputs/exports")
FILES: Final = {"onnx": "model.onnx", "torch": "model.pt2"}
DESCRIPTION: Final = "model.json"
RADAR_RETURNS: Final = len(RADARS) * RADAR_SWEEPS * 125  # most that all RADARs return in all sweeps
FAR: Final = 1e6  # metres; where no grid reaches
CAMERA_INPUTS: Final = ("images", "intrinsics", "image_aug", "lidar_SE3_cam")
MEANING: Final = {
    "images": "[sample, keyframe, camera, RGB, row, column], 0 to 255, not normalised; keyframe 0 is the current one",
    "intrinsics": "camera frame -> raw pixels; whole numbers are the centres of pixels",
    "image_aug": "raw pixels -> pixels of images: resize and crop",
    "lidar_SE3_cam": "camera at its own time -> LiDAR frame of the current keyframe, metres",
    "has_previous": "whether keyframe 1 is the previous one; if not, it repeats keyframe 0",
    "radar": "x, y, z in the LiDAR frame, cross section in dBsm, vx and vy over ground, age in s; then padding",
    "radar_count": "how many rows of radar are returns",
    "heatmap": "logit of each class of the task",
    "reg": "x and y of the centre from the low corner of its cell, cells",
    "height": "z of the centre, metres",
    "dim": "length, width, height: metres, or their logarithms where decoding.log_size",
    "rot": "sine and cosine of yaw",
    "vel": "vx and vy, m/s",
}  # of the inputs, and of the maps of a task


class Student(nn.Module):
    """A detector as a function of named tensors to named tensors, in the LiDAR frame."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.student = detector

    def forward(self, inputs: Maps) -> Maps:
        """Head maps by the names of the outputs."""
        first = next(iter(inputs.values()))
        nothing = first.new_zeros(0, dtype=torch.float32)
        identity = torch.eye(4, device=first.device).expand(len(first), 4, 4)
        given: dict[str, Any] = {name: inputs.get(name, nothing) for name in (*CAMERA_INPUTS, "has_previous")}
        radar = returns(inputs) if "radar" in inputs else []
        given |= {"bev_aug": identity, "depth": nothing, "labelled": nothing}
        batch = Batch([], points=[], radar=radar, boxes=[], labels=[], **given)
        head = self.student(batch).head
        return {f"task{number}_{name}": value for number, task in enumerate(head) for name, value in task.items()}


def run(root: Path, *, key: str, out: Path | None, formats: Sequence[str], samples: int) -> int:
    """Export a published student, compare the files with it, put them in place and say what they are.

    Args:
        root: of the project.
        key: `<variant>-<seed>`, or the name of a teacher.
        out: folder of the files; None: outputs/exports/<key>.
        formats: of FILES.
        samples: keyframes of `evaluate.split` to compare on.
    """
    folder, params = published(root, key), load_params(root)
    out = out or root / EXPORTS / key
    _check_free(out)
    student = Student(load_student(folder)).eval()
    given = read_inputs(root, params, student.student, samples)
    with tempfile.TemporaryDirectory() as made:
        target = Path(made) / "export"
        target.mkdir()
        runners: dict[str, Runner] = {EAGER: student, **export(student, given[0], formats, target)}
        difference = compare(runners, given, student.student, params.evaluate.score_threshold)
        print(words(key, student, target, difference, latencies_ms(runners, given[0])))
        _check(difference)
        checked = {"split": params.evaluate.split, "keyframes": len(given), "tolerance": TOLERANCE}
        described = description(key, folder, student, given[0], target)
        described["checked"] = checked | {"largest_difference": difference}
        (target / DESCRIPTION).write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")
        publish(target, out)
    print(f"written: {out.relative_to(root) if out.is_relative_to(root) else out}")
    return 0


def published(root: Path, key: str) -> Path:
    """Folder of the published weights of a student or a teacher.

    Raises:
        StageError: there is none of that name; names those that are there.
    """
    folders = {
        path.parent.name: path.parent
        for kind in ("teachers", "students")
        for path in sorted((root / "outputs" / kind).glob(f"*/{WEIGHTS}"))
    }
    if key not in folders:
        raise StageError(
            f"export {key!r}: no such student (<variant>-<seed>) or teacher in outputs; there are: "
            f"{', '.join(folders) or 'none, run the study first'}"
        )
    return folders[key]


def load_student(folder: Path) -> Detector:
    """The published detector, if it can do without LiDAR.

    Raises:
        StageError: it is no detector, reads LiDAR, or is not whole.
    """
    try:
        detector = load_detector(folder)
    except ValueError as error:
        raise StageError(f"export {folder.name!r}: {error}") from error
    if "points" in detector.sensors:
        raise StageError(
            f"export {folder.name!r}: {type(detector).__name__} reads LiDAR; only detectors that read "
            "cameras or RADAR leave"
        )
    return detector


def read_inputs(root: Path, params: Params, detector: Detector, samples: int) -> list[Maps]:
    """The first keyframes of `evaluate.split` as inputs by name, a batch of one each, at the detector's image size."""
    size = detector.image if isinstance(detector, CameraDetector) and detector.image else params.input.image.size
    image = params.input.image.model_copy(update={"size": size})
    changes = {"frames": detector.frames, "depth_stride": 1, "image": image}
    own = params.model_copy(update={"input": params.input.model_copy(update=changes)})
    dataset = plain_dataset(root, own, getattr(params.data.splits, params.evaluate.split), detector)
    if not len(dataset):
        raise StageError(f"evaluate.split {params.evaluate.split!r} has no keyframe to compare on")
    return [inputs_of(collate([dataset[i]]), detector) for i in range(min(samples, len(dataset)))]


def inputs_of(batch: Batch, detector: Detector) -> Maps:
    """What a detector reads of a batch, by name.

    Raises:
        StageError: there are more RADAR returns than an exported student takes.
    """
    inputs: Maps = {}
    if "images" in detector.sensors:
        inputs |= {name: getattr(batch, name) for name in CAMERA_INPUTS}
        inputs |= {"has_previous": batch.has_previous} if detector.frames == 2 else {}
    if "radar" in detector.sensors:
        counts = [len(sample) for sample in batch.radar]
        if max(counts) > RADAR_RETURNS:
            raise StageError(f"{max(counts)} RADAR returns in a keyframe: an exported student takes {RADAR_RETURNS}")
        padded = [F.pad(sample, (0, 0, 0, RADAR_RETURNS - len(sample))) for sample in batch.radar]
        inputs |= {"radar": torch.stack(padded), "radar_count": torch.tensor(counts)}
    return inputs


def returns(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """RADAR returns of each sample; rows that are none are moved out of sight."""
    radar, count = inputs["radar"], inputs["radar_count"]
    counts = torch.arange(radar.shape[1], device=radar.device) < count[:, None]
    return list(torch.where(counts.unsqueeze(-1), radar, FAR).unbind())


def export(student: Student, inputs: Maps, formats: Sequence[str], folder: Path) -> dict[str, Runner]:
    """Write a student in some formats, of FILES, and read each file again.

    Args:
        student: in evaluation mode, on the CPU.
        inputs: whose shapes the files have.
        formats: of FILES.
        folder: of the files.

    Returns:
        What runs the files, by format.

    Raises:
        StageError: a part of the student has no graph of fixed shapes; says which.
    """
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(student, (inputs,), strict=False)
        except ValueError as error:
            raise StageError(f"export: {error}") from error
        _forget_origin(program)
        names = list(inputs), list(student(inputs))
        return {name: WRITERS[name](program, *names, folder / FILES[name]) for name in formats}


def _write_torch(program: ExportedProgram, inputs: list[str], outputs: list[str], path: Path) -> Runner:
    """Save a program; what runs the file."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, inputs: list[str], outputs: list[str], path: Path) -> Runner:
    """Save a program as ONNX with these names of its inputs and outputs; what runs the file."""
    made = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of code, in folders of this machine
    made.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def runner(given: Maps) -> Maps:
        found = session.run(outputs, {name: value.numpy() for name, value in given.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return runner


WRITERS: Final = {"onnx": _write_onnx, "torch": _write_torch}


def _forget_origin(program: ExportedProgram) -> None:
    """Drop what a graph was made with: a keyframe's images, and lines of code in folders of this machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _check(difference: Difference) -> None:
    """Refuse files that compute something else than the student."""
    wrong = [
        f"{FILES[name]}: {output} {value:.2g}"
        for name, by in difference.items()
        for output, value in by.items()
        if not value <= TOLERANCE
    ]
    if wrong:
        raise StageError(
            f"the exported student differs from the published one by more than {TOLERANCE:g}, nothing was "
            f"written: {', '.join(wrong[:10])}"
        )


def description(key: str, folder: Path, student: Student, inputs: Maps, made: Path) -> dict[str, Any]:
    """What whoever runs the files must know: inputs, outputs, how boxes are read off them, and what they are."""
    with torch.no_grad():
        outputs = student(inputs)
    files = {
        name: {"file": file, "bytes": (made / file).stat().st_size}
        for name, file in FILES.items()
        if (made / file).exists()
    }
    return {
        "key": key,
        "model": type(student.student).__name__,
        "parameters": parameters_of(student),
        "weights": {"file": WEIGHTS, "checksum": checksum_of((folder / WEIGHTS).read_bytes())},
        "files": files,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        "inputs": [_tensor(name, value, name) for name, value in inputs.items()],
        "outputs": [_tensor(name, value, name.partition("_")[2]) for name, value in outputs.items()],
        "decoding": decoding(student.student),
    }


def _tensor(name: str, value: Tensor, meaning: str) -> dict[str, Any]:
    """Of an input or output."""
    dtype = str(value.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(value.shape), "meaning": MEANING[meaning]}


def decoding(detector: Detector) -> dict[str, Any]:
    """All numbers that decoding head maps needs; docs/export.md has the steps."""
    head = detector.head
    assert isinstance(head, GridCenterHead)
    grid = head.grid
    return {
        "grid": {"range": grid.range, "cell": grid.cell, "size": grid.size},
        "tasks": head.class_names,
        "candidates": head.candidates,
        "score_threshold": head.score_threshold,
        "center_range": list(head.center_range),
        "log_size": head.targets.norm_bbox,
        "largest_log_size": MAX_LOG_SIZE,
        "nms_radius": list(head.nms_radius),
        "most_boxes": head.max_detections,
    }


def words(key: str, student: Student, folder: Path, difference: Difference, latencies: Mapping[str, float]) -> str:
    """What was exported, and how far it is from the published student, for a person."""
    model, parameters = type(student.student).__name__, parameters_of(student) / 1e6
    lines = [f"{key}: {model}, {parameters:.2f} M parameters, torch {latencies[EAGER]:.1f} ms"]
    for name, by in difference.items():
        size = (folder / FILES[name]).stat().st_size / 1e6
        lines.append(f"{FILES[name]}: {size:.1f} MB, {latencies[name]:.1f} ms; largest differences from torch:")
        kinds: dict[str, float] = {}
        for output, value in by.items():
            kind = output.partition("_")[2] or output
            kinds[kind] = max(value, kinds.get(kind, 0.0))
        figures = ", ".join(f"{kind} {value:.1e}" for kind, value in kinds.items())
        lines.append(f"  {figures}{'' if 'boxes' in kinds else ', no box with a score to compare'}")
    return "\n".join(lines)


def _check_free(out: Path) -> None:
    """Refuse a folder with anything but an earlier export: publishing replaces a folder whole."""
    ours = {*FILES.values(), DESCRIPTION}
    if out.exists() and (not out.is_dir() or any(path.name not in ours for path in out.iterdir())):
        raise StageError(f"{out} is not an export, and would be replaced: remove it, or give another --out")


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters tell of packages that nobody asked for, and of their own deprecated parts."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
