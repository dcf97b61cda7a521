"""What takes how long at the size of nuScenes trainval: 850 scenes, 34,000 keyframes, 2.7 M records, 1.2 M boxes.

python benchmarks/scale.py                      (needs 27 GB of disk; in under 15 minutes on two cores)
python benchmarks/scale.py --against COMMIT     (`prepare` beside that of another commit)
python benchmarks/scale.py --scenes 85 --store 2 --no-devkit

The tables are made here, with numbers at random; sensor files are links to one file per kind. Every measured step is a
process of its own: seconds on the clock, seconds of CPU, and the most memory that it held. The devkit's side of the
metrics is measured on a part of the validation split, as all of it would take a quarter of an hour and 12 GB. What
follows an index is measured on a study of 40 arms (`benchmarks/large_study.py`), and once more on a quarter of them,
beside which what grows faster than the study would be seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.environment import cores
from benchmarks import large_study
from benchmarks.start import checked_out
from data.preparing.splits import official_splits
from data.reading.classes import CATEGORY_TO_CLASS, CLASSES
from data.reading.index import CAMERAS, LIDAR, RADARS, Index
from data.scoring.submission import SampleDetections, build_submission, write_submission

ROOT: Final = Path(__file__).resolve().parents[1]
VERSION: Final = "v1.0-trainval"
KEYFRAMES: Final = 40  # of a scene, at 2 Hz
BOXES: Final = 36  # of a keyframe
POINTS: Final = 34_720  # of a sweep
FOUND: Final = 200  # boxes of a keyframe in the submission
PER_KEYFRAME: Final = {LIDAR: 10, **dict.fromkeys(CAMERAS, 6), **dict.fromkeys(RADARS, 6.5)}  # records
LARGE: Final = ("sample", "sample_data", "ego_pose", "sample_annotation", "instance")  # tables
SUFFIX: Final = {"L": "pcd.bin", "C": "jpg", "R": "pcd"}
CATEGORIES: Final = [*CATEGORY_TO_CLASS, "static_object.bicycle_rack", "animal"]
PREPARE: Final = (
    "from data.preparing.build import build_index; import sys; "
    "build_index(sys.argv[1], 'v1.0-trainval', ['train', 'val'], sys.argv[2])"
)
METRICS: Final = """
import sys
from pathlib import Path
from data.reading.index import Index
from data.scoring.evaluation import summary
from data.scoring.nuscenes import evaluate_submission
from data.scoring.submitted import read_submission
scores = summary(evaluate_submission(Index.open(sys.argv[1]), read_submission(Path(sys.argv[2])), sys.argv[3]))
print(scores["mAP"], scores["NDS"])
"""
DEVKIT: Final = """
import sys, time
from pathlib import Path
from data.scoring.devkit import evaluate_submission, open_tables
from data.scoring.evaluation import summary
began = time.process_time()
tables = open_tables(Path(sys.argv[1]), "v1.0-trainval")
spent = time.process_time() - began
scores = summary(evaluate_submission(tables, Path(sys.argv[2]), sys.argv[3]))
print(scores["mAP"], scores["NDS"], f"; {spent:.0f} s of CPU are its tables")
"""
OPEN: Final = """
import sys, time
from data.reading.index import Index
began = time.perf_counter()
Index.open(sys.argv[1])
print(f"{1000 * (time.perf_counter() - began):.1f}")
"""
# What eight workers of a loader hold by themselves once each has read a thousand records.
WORKERS: Final = """
import os, random, sys
from data.reading.index import Index
index, private = Index.open(sys.argv[1]), []
def held():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000
for worker in range(8):
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = held()
        rows = random.Random(worker).sample(range(len(index)), min(1000, len(index)))
        for row in rows:
            index.sample(row)
        os.write(writer, f"{held() - before}".encode())
        os._exit(0)
    private.append(float(os.read(reader, 100)))
    os.wait()
print(f"{max(private):.0f}")
"""


@dataclass(frozen=True)
class Measured:
    """What a process took."""

    seconds: float
    cpu: float
    memory: float  # GB
    output: str


def measure(code: str, *arguments: Path | str, tree: Path = ROOT) -> Measured:
    """Run a program in the folder of a tree; see `measure_command`."""
    return measure_command([sys.executable, "-c", code, *map(str, arguments)], tree)


def measure_command(command: list[str], folder: Path) -> Measured:
    """Run a command in a folder.

    Raises:
        RuntimeError: it fails; with the end of what it wrote.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        errors.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command[-3:])} failed:\n{errors.read()[-2000:]}")
        return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6, out.read().strip())


def row(name: str, measured: Measured, note: str = "") -> None:
    """Print a line of the table at once: somebody may be waiting."""
    figures = f"{measured.seconds:.1f} | {measured.cpu:.1f} | {measured.memory:.2f}"
    print(f"| {name} | {figures} | {note} |", flush=True)


def sensor_blobs() -> dict[str, bytes]:
    """By suffix a 1600 x 900 picture and a sweep of 34,720 points: of nuScenes' sizes, and some of their structure."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(90, 170, (45, 80, 3), dtype=np.uint8)
    fine = rng.normal(0, 2, (900, 1600, 3))
    picture = np.clip(cv2.resize(coarse, (1600, 900), interpolation=cv2.INTER_CUBIC) + fine, 0, 255).astype(np.uint8)
    sweep = np.zeros((POINTS, 5), np.float32)
    angle, distance = rng.uniform(-np.pi, np.pi, POINTS), rng.gamma(2.0, 8.0, POINTS)
    sweep[:, 0], sweep[:, 1] = distance * np.cos(angle), distance * np.sin(angle)
    sweep[:, 2], sweep[:, 3] = rng.uniform(-1.8, 3, POINTS), rng.integers(0, 255, POINTS)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]  # 0.2 MB, as nuScenes' have
    return {"jpg": jpeg.tobytes(), "pcd.bin": sweep.tobytes()}


class Trainval:
    """A dataroot of the size of trainval, or of its first scenes."""

    def __init__(self, root: Path, scenes: int) -> None:
        splits = official_splits()
        val = max(scenes * len(splits["val"]) // 850, 1)
        self.root, self.folder = root, root / VERSION
        self.names = [*splits["train"][: scenes - val], *splits["val"][:val]]
        self.folder.mkdir(parents=True)
        self.channels = list(PER_KEYFRAME)

    def make(self) -> None:
        """Write tables and links."""
        self._small_tables()
        with ExitStack() as stack:
            files = {name: stack.enter_context((self.folder / f"{name}.json").open("w")) for name in LARGE}
            pool = stack.enter_context(ProcessPoolExecutor(cores()))
            for number, tables in enumerate(pool.map(SceneTables.of, range(len(self.names)))):
                for name, records in tables.items():
                    files[name].write(",\n".join(["[\n" * (number == 0) + records[0], *records[1:]]))
                    files[name].write(",\n" if number + 1 < len(self.names) else "\n]")
        self._blobs()

    def _small_tables(self) -> None:
        scenes = [
            {"token": f"scene-{n}", "log_token": "log", "nbr_samples": KEYFRAMES, "name": name, "description": "",
             "first_sample_token": token("s", n, 0), "last_sample_token": token("s", n, KEYFRAMES - 1)}
            for n, name in enumerate(self.names)
        ]  # fmt: skip
        calibrations = [
            {"token": channel, "sensor_token": channel, "translation": [0.9, 0.1, 1.8], "rotation": [0.7, 0, 0, -0.7],
             "camera_intrinsic": [[1266.4, 0, 816.2], [0, 1266.4, 491.5], [0, 0, 1]] if channel in CAMERAS else []}
            for channel in self.channels
        ]  # fmt: skip
        levels = ("v0-40", "v40-60", "v60-80", "v80-100")
        tables: dict[str, list[dict[str, Any]]] = {
            "scene": scenes,
            "calibrated_sensor": calibrations,
            "sensor": [{"token": channel, "channel": channel, "modality": "x"} for channel in self.channels],
            "category": [{"token": name, "name": name, "description": ""} for name in CATEGORIES],
            "attribute": [{"token": "moving", "name": "vehicle.moving", "description": ""}],
            "visibility": [{"token": str(n), "level": level, "description": ""} for n, level in enumerate(levels, 1)],
            "log": [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": "boston-seaport"}],
            "map": [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/map.png"}],
        }
        for name, records in tables.items():
            (self.folder / f"{name}.json").write_text(json.dumps(records, indent=0))

    def _blobs(self) -> None:
        """One file per kind, and links to it under every name that `prepare` looks at."""
        for folder in ("samples", "sweeps"):
            for channel in self.channels:
                (self.root / folder / channel).mkdir(parents=True)
        (self.root / "maps").mkdir()
        (self.root / "maps/map.png").write_bytes(b"")
        for suffix, content in sensor_blobs().items():
            (self.root / f"blob.{suffix}").write_bytes(content)

        def link(n: int) -> None:
            start = 1_532_402_900_000_000 + n * 30_000_000
            for channel in (LIDAR, *CAMERAS):
                count = int(PER_KEYFRAME[channel] * KEYFRAMES)
                step, suffix, last = KEYFRAMES * 500_000 / count, SUFFIX[channel[0]], -1
                for r in range(count):
                    sample = int(r * KEYFRAMES / count)
                    key, last = sample != last, sample
                    if key or channel == LIDAR:
                        name = f"n015-2018-07-24-11-22-45+0800__{channel}__{n:03d}{start + int(r * step)}.{suffix}"
                        os.symlink(
                            f"../../blob.{suffix}", self.root / ("samples" if key else "sweeps") / channel / name
                        )

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(link, range(len(self.names))))


class SceneTables:
    """What the large tables say of one scene."""

    def __init__(self, n: int) -> None:
        self.rng = np.random.default_rng(n)
        self.tables: dict[str, list[str]] = {name: [] for name in LARGE}

    @classmethod
    def of(cls, n: int) -> dict[str, list[str]]:
        """Records by table of scene `n`, in JSON."""
        scene, start = cls(n), 1_532_402_900_000_000 + n * 30_000_000
        for k in range(KEYFRAMES):
            scene._write(
                "sample", token("s", n, k), timestamp=start + k * 500_000, prev=token("s", n, k - 1, KEYFRAMES),
                next=token("s", n, k + 1, KEYFRAMES), scene_token=f"scene-{n}",
            )  # fmt: skip
        for c, channel in enumerate(PER_KEYFRAME):
            scene._records(n, c, channel, start)
        scene._objects(n)
        return scene.tables

    def _records(self, n: int, c: int, channel: str, start: int) -> None:
        count = int(PER_KEYFRAME[channel] * KEYFRAMES)
        step = KEYFRAMES * 500_000 / count
        height, width = (900, 1600) if channel in CAMERAS else (0, 0)
        last = -1
        for r in range(count):
            sample = int(r * KEYFRAMES / count)
            key, last = sample != last, sample
            time_stamp = start + int(r * step)
            folder, suffix = "samples" if key else "sweeps", SUFFIX[channel[0]]
            own = token(f"d{c:x}", n, r)
            self._write(
                "sample_data", own, sample_token=token("s", n, sample), ego_pose_token=token(f"e{c:x}", n, r),
                calibrated_sensor_token=channel, timestamp=time_stamp, fileformat=suffix.split(".")[0],
                is_key_frame=key, height=height, width=width,
                filename=f"{folder}/{channel}/n015-2018-07-24-11-22-45+0800__{channel}__{n:03d}{time_stamp}.{suffix}",
                prev=token(f"d{c:x}", n, r - 1, count), next=token(f"d{c:x}", n, r + 1, count),
            )  # fmt: skip
            place = [600.123456 + 6.0 * r * step * 1e-6, 1600.654321, 0.0]
            self._write("ego_pose", token(f"e{c:x}", n, r), timestamp=time_stamp,
                        rotation=[0.5721129977125774, -0.0013962672157460336, 0.011922598388195, -0.820085221231],
                        translation=place)  # fmt: skip

    def _objects(self, n: int) -> None:
        """Two halves of a scene with other objects each."""
        half = KEYFRAMES // 2
        for o in range(2 * BOXES):
            category = CATEGORIES[int(self.rng.choice(len(CATEGORIES), p=_shares()))]
            first = half * (o % 2)
            x, y = self.rng.uniform(-55, 55, 2).tolist()
            speed = float(self.rng.normal(0, 3))
            sizes, turn = self.rng.uniform(0.5, 5, 3).round(3).tolist(), self.rng.normal(0, 1, 2)
            turn /= np.linalg.norm(turn)
            points = self.rng.integers(0, 30, half).tolist()
            self._write("instance", token("i", n, o), category_token=category, nbr_annotations=half,
                        first_annotation_token=token(f"a{o:x}", n, 0),
                        last_annotation_token=token(f"a{o:x}", n, half - 1))  # fmt: skip
            for k in range(half):
                place = [600.0 + 3.0 * (first + k) + x + speed * k / 2, 1600.0 + y, 1.0]
                self._write(
                    "sample_annotation", token(f"a{o:x}", n, k), sample_token=token("s", n, first + k),
                    instance_token=token("i", n, o), visibility_token=str(1 + k % 4),
                    attribute_tokens=["moving"] * category.startswith("vehicle"), translation=place, size=sizes,
                    rotation=[float(turn[0]), 0.0, 0.0, float(turn[1])], num_lidar_pts=points[k], num_radar_pts=0,
                    prev=token(f"a{o:x}", n, k - 1, half), next=token(f"a{o:x}", n, k + 1, half),
                )  # fmt: skip

    def _write(self, table: str, own: str, **fields: Any) -> None:
        """A record as nuScenes writes it: one field per line."""
        lines = ",\n".join(f'"{name}": {_written(value)}' for name, value in fields.items())
        self.tables[table].append(f'{{\n"token": "{own}",\n{lines}\n}}')


def token(kind: str, scene: int, number: int, count: int | None = None) -> str:
    """A token of 32 characters; none beyond the ends of a chain of `count`."""
    return f"{kind}{scene:04x}{number:06x}".rjust(32, "0") if count is None or 0 <= number < count else ""


def _written(value: Any) -> str:
    """A value in JSON; repr is a third of the time of json.dumps."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ",\n".join(map(_written, value)) + "]"
    return repr(value)


def _shares() -> list[float]:
    """How often each category is drawn: half are cars, a quarter pedestrians."""
    shares = np.array([{"vehicle.car": 12.0, "human.pedestrian.adult": 6.0}.get(name, 0.5) for name in CATEGORIES])
    return (shares / shares.sum()).tolist()


def submission(index: Index, split: str, path: Path) -> int:
    """The truth moved, and boxes anywhere, FOUND a keyframe; returns the number of boxes."""
    rng, found = np.random.default_rng(1), {}
    for name, number in zip(index.tokens(split), index.rows(split).tolist(), strict=True):
        truth = index.annotations(number)
        boxes = np.zeros((FOUND, 9))
        known = min(len(truth.boxes), FOUND // 2)
        boxes[:known] = np.nan_to_num(truth.boxes[:known])
        boxes[:known, :2] += rng.normal(0, 0.7, (known, 2))
        boxes[known:, :2], boxes[known:, 3:6] = rng.uniform(-50, 50, (FOUND - known, 2)), 1.0
        labels = rng.choice(len(CLASSES), FOUND, p=[0.45, 0.05, 0.02, 0.02, 0.03, 0.1, 0.02, 0.01, 0.25, 0.05])
        labels[:known] = truth.labels[:known]
        found[name] = SampleDetections(boxes, rng.uniform(0, 1, FOUND), labels)
    write_submission(build_submission(found, index, split, {"camera"}), path)
    return FOUND * len(found)


def main() -> None:
    """Make the tables, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=850)
    parser.add_argument("--folder", type=Path, help="kept, and used again if it is there; default: a temporary one")
    parser.add_argument("--store", type=float, default=20.0, help="gigabytes of the store that DVC hashes and links")
    parser.add_argument("--against", metavar="COMMIT", help="measured beside this tree")
    parser.add_argument("--no-devkit", dest="devkit", action="store_false", help="do not run the devkit")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = {"here": ROOT}
        if options.against:
            trees = {options.against: stack.enter_context(checked_out(options.against)), **trees}
        run(folder, options.scenes, trees, options.devkit)
        for arms in (large_study.ARMS // 4, large_study.ARMS):
            of_study(folder, arms)
        of_store(folder, options.store)


def run(folder: Path, scenes: int, trees: dict[str, Path], with_devkit: bool) -> None:
    """All measurements, a line each."""
    dataroot = folder / "trainval"
    if not dataroot.exists():
        began = time.perf_counter()
        Trainval(dataroot, scenes).make()
        size = sum(path.stat().st_size for path in (dataroot / VERSION).iterdir()) / 1e9
        print(f"{scenes} scenes, {size:.2f} GB of tables, made in {time.perf_counter() - began:.0f} s\n", flush=True)
    print("| | seconds | CPU | most memory, GB | |\n|---|---|---|---|---|")
    indices = {name: folder / f"index-{name}" for name in trees}
    for name, tree in trees.items():
        shutil.rmtree(indices[name], ignore_errors=True)
        row(f"`prepare`, {name}", measure(PREPARE, dataroot, indices[name], tree=tree))
    opened = measure(OPEN, indices["here"])
    row("opening the index", opened, f"{opened.output} ms of it")
    workers = measure(WORKERS, indices["here"])
    row("eight workers of a loader", workers, f"{workers.output} MB private to one for a thousand records")
    for part, compared in _parts(scenes):
        path = folder / "results.json"
        boxes = submission(Index.open(indices["here"]), part, path)
        ours = measure(METRICS, indices["here"], path, part)
        row(
            f"metrics of {part}",
            ours,
            f"{boxes:,} boxes, {path.stat().st_size / 1e6:.0f} MB; mAP and NDS {ours.output}",
        )
        if with_devkit and compared:
            theirs = measure(DEVKIT, dataroot, path, part)
            row(f"the devkit's of {part}", theirs, f"mAP and NDS {theirs.output}")


def of_study(folder: Path, arms: int) -> None:
    """What a person waits for beside training, in a workspace of `arms` arms and three seeds on the tables."""
    root = folder / f"study-{arms}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    large_study.workspace(root, ROOT, folder / "trainval", folder / "index-here", arms)
    runs = large_study.publish(root, Index.open(folder / "index-here"))
    for words in ("check", "run --dry-run", "cache plan", "report"):
        command = [sys.executable, "-m", "pipeline", *words.split()]
        row(f"`{words}`, {arms} arms, {runs} runs", measure_command(command, root))


def of_store(folder: Path, gigabytes: float) -> None:
    """What DVC takes for a store: hashed into the cache and linked, looked at again, put back."""
    root = folder / "store"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    files = large_study.store(root, gigabytes)
    dvc = [sys.executable, "-m", "dvc"]
    row(
        f"`dvc add` of a store of {gigabytes:g} GB",
        measure_command([*dvc, "add", "--quiet", "store"], root),
        f"{files} files",
    )
    row("`dvc status` of it", measure_command([*dvc, "status", "--quiet"], root))
    shutil.rmtree(root / "store")
    row("`dvc checkout` of it", measure_command([*dvc, "checkout", "--quiet"], root))
    shutil.rmtree(root)


def _parts(scenes: int) -> Iterator[tuple[str, bool]]:
    """What of the validation split is scored, and whether by the devkit as well."""
    yield "val[:5]" if scenes >= 50 else "val", True
    yield "val", False


if __name__ == "__main__":
    main()
