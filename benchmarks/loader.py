"""What a sample costs the loader at the papers' size: 256 x 704, ten sweeps, two frames, every modality.

python benchmarks/loader.py                     (CPU milliseconds per sample, by what is loaded)
python benchmarks/loader.py --against COMMIT    (beside the same of another commit, in turn)

The dataroot is made up: 1600 x 900 JPEGs and sweeps of 34,720 points, nuScenes' sizes. A digest of what the samples
hold is printed, so that equal bits are seen to be equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scale import Trainval
from benchmarks.start import checked_out

ROOT: Final = Path(__file__).resolve().parents[1]
PARTS: Final = {
    "everything": ["images", "points", "boxes", "depth"],
    "images": ["images"],
    "points": ["points"],
    "depth": ["depth"],
    "boxes": ["boxes"],
}
SAMPLE: Final = """
import hashlib, json, sys, time
from data.preparing.build import build_index
from data.reading.config import BevConfig, GridConfig, ImageConfig, InputConfig
from data.reading.dataset import NuScenesDataset
root, work, parts, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
build_index(root, "v1.0-trainval", ["val"], work)  # by each commit, as the format may differ
image = ImageConfig(size=(256, 704), resize=(0.877, 1.25), rotate=5.4, flip=0.5)
bev = BevConfig(flip_x=0.5, flip_y=0.5, rotate=22.5, scale=(0.95, 1.05))
config = InputConfig(frames=2, sweeps=10, radar=False, image=image, bev=bev, depth_stride=16)
grid = GridConfig(range=51.2, cell=0.8, z=(-5.0, 3.0))
dataset = NuScenesDataset(work, root, "val", config, grid, train=True, modalities=parts)
dataset[1]
began, digest = time.process_time(), hashlib.sha256()
samples = [dataset[1 + n % (len(dataset) - 1)] for n in range(count)]
spent = (time.process_time() - began) / count
for sample in samples:
    for value in (sample.images, sample.points, sample.depth, sample.boxes):
        digest.update(value.numpy().tobytes())
print(json.dumps([spent, digest.hexdigest()[:12]]))
"""


def dataroot(root: Path) -> Path:
    """One scene of training and one of validation whose files have the sizes of real ones."""
    Trainval(root, 2).make()
    return root


def measure(tree: Path, root: Path, parts: list[str], count: int) -> tuple[float, str]:
    """CPU seconds per sample, and the digest of the samples."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-c", SAMPLE, str(root), work, json.dumps(parts), str(count)]
        done = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    spent, digest = json.loads(done.stdout)
    return spent, digest


def main() -> None:
    """Make the dataroot, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--against", metavar="COMMIT", help="measured beside this tree")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = dataroot(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "root")
        trees = {"here": ROOT}
        if options.against:
            trees = {options.against: stack.enter_context(checked_out(options.against)), **trees}
        found: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for _ in range(options.rounds):
            for part, parts in PARTS.items():
                for name, tree in trees.items():
                    found.setdefault((part, name), []).append(measure(tree, root, parts, options.samples))
    print(f"| CPU ms per sample, least of {options.rounds} | {' | '.join(trees)} | | bits |")
    print(f"|---|{'---|' * (len(trees) + 2)}")
    for part in PARTS:
        least = [1000 * min(spent for spent, _ in found[part, name]) for name in trees]
        bits = {digest for name in trees for _, digest in found[part, name]}
        change = f"{100 * (least[-1] / least[0] - 1):+.0f} %" if len(least) > 1 else ""
        figures = " | ".join(f"{value:.1f}" for value in least)
        print(f"| {part} | {figures} | {change} | {'equal' if len(bits) == 1 else 'other'} |")


if __name__ == "__main__":
    main()
