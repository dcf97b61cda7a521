"""Whether an edit changed any result: the smoke study by two trees of code, and the hashes of what each made.

    python benchmarks/golden.py --against COMMIT

Every stage of a study with teachers of LiDAR, fusion and instances, three students and their stores runs twice, once by
the code of the commit and once by this one, each in a folder of its own. Compared are the published weights, the index,
what stores hold (decoded: their heads name the code that wrote them), the metrics, the evaluations, and the summary of
the report without what was measured in seconds. It takes some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.start import checked_out  # noqa: E402

STUDY = {
    "teachers": ["lidar", "start"], "fusions": {"fusion": {"lidar": "lidar", "camera": "start"}}, "large": {},
    "segmenters": ["instance"],
    "stores": ["lidar", "fusion", "instance"], "variants": ["baseline", "modal", "simdistill", "x3kd"], "baselines": [],
    "featured": [],
}  # fmt: skip
MADE = ("students/*/*", "teachers/*/*", "index/*")  # below outputs
MEASURED = ("cost", "efficiency")  # of summary.json: seconds differ from run to run

# Run by each tree's own code, in its folder: what to call has stood there for long.
WORK = """
import hashlib, json, sys
from pathlib import Path
from data.store import Store
from tests.e2e.conftest import set_study
from tests.e2e.forks import run_all
root, study = Path(sys.argv[1]), json.loads(sys.argv[2])
if (root / "params").is_dir():
    set_study(root, study)
else:  # commits whose second steps are lists
    set_study(root / "params.yaml", study | {key: list(study[key]) for key in ("fusions", "large")})
run_all(root)
for folder in sorted((root / "outputs/stores").glob("*/")):
    store, found = Store.open(folder), hashlib.sha256()
    for token in sorted(store.tokens):
        for name, value in sorted(store.read(token).items()):
            found.update(name.encode() + value.tobytes())
    (root / f"{folder.name}.store").write_text(found.hexdigest())
"""


def hashes(tree: Path, folder: Path) -> dict[str, str]:
    """Name -> sha256 of everything that the code of a tree makes in a folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=tree, text=True, capture_output=True, check=True)
    for name in listed.stdout.split():
        if (tree / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((tree / name).read_bytes())
    for stale in (folder / "reports").rglob("*.json"):
        stale.unlink()
    (folder / "dvc.lock").unlink(missing_ok=True)
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "pipeline", "profile", "smoke"]):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-c", WORK, folder, json.dumps(STUDY)], cwd=tree, check=True)
    files = {f"outputs/{path.relative_to(folder / 'outputs')}": path.read_bytes()
             for pattern in MADE for path in (folder / "outputs").glob(pattern) if path.is_file()}  # fmt: skip
    files |= {f"metrics of {path.stem}": path.read_bytes() for path in (folder / "reports/metrics").glob("*.json")}
    files |= {f"evaluation of {path.parent.name}": path.read_bytes()
              for path in (folder / "outputs").glob("*/*/evaluation.json")}  # fmt: skip
    files |= {f"store {path.stem}": path.read_bytes() for path in folder.glob("*.store")}
    summary = json.loads((folder / "reports/summary.json").read_text())
    files["summary"] = json.dumps({key: value for key, value in summary.items() if key not in MEASURED}).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}


def main() -> int:
    """Print the hashes, and what differs; 1 where something does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", required=True)
    with checked_out(parser.parse_args().against) as tree, tempfile.TemporaryDirectory() as folder:
        found = [hashes(code, Path(folder) / name) for code, name in ((tree, "before"), (ROOT, "after"))]
    for name in sorted(found[0].keys() | found[1].keys()):
        before, after = (side.get(name, "absent") for side in found)
        print(f"{after[:16]}  {name}" + ("" if before == after else f"  DIFFERENT, {before[:16]} before"))
    return int(found[0] != found[1])


if __name__ == "__main__":
    sys.exit(main())
