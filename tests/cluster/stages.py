"""Stages that tell where they ran and wait on request, for projects on a cluster."""

from __future__ import annotations

from tests.pipeline.project import Project

NAME = "distill@baseline-0"

# Notes what it sees in seen-<key>-<rank>.json; while the file `hang` is there, it goes on until it is asked to stop,
# and notes that it saved. `fail` and `die` end it badly.
DISTILL = """
import json, os, sys, time

def run(context):
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "OMP_NUM_THREADS")}
    seen |= {"pid": os.getpid(), "world": context.world_size, "python": sys.executable}
    print("says", context.key, flush=True)
    with open(f"seen-{context.key}-{context.rank}.part", "w") as file:
        json.dump(seen, file)
    os.rename(file.name, file.name.replace(".part", ".json"))
    if os.path.exists("fail"):
        raise ValueError("no such luck")
    if os.path.exists("die"):
        os.kill(os.getpid(), 9)
    while os.path.exists("hang"):
        if context.stop.is_set():
            open("saved", "a").write(f"{context.key}\\n")
            raise SystemExit(75)
        time.sleep(0.05)
    if context.rank == 0:
        (context.scratch / "student").write_text(context.key)
    context.publish(context.scratch / "student", f"outputs/students/{context.key}")
"""


def prepared(project: Project, **meta: object) -> Project:
    """The project with these stages; `meta` of stage distill."""
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    text = ", ".join(f"{key}: {str(value).lower()}" for key, value in meta.items())
    project.edit("dvc.yaml", "meta: {gpus: 1, timeout_h: 1, distributed: true}", f"meta: {{{text}}}")
    project.write("stages/distill.py", DISTILL)
    return project
