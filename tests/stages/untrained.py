"""A root to extract from: the code, a tiny city, its index and a teacher that nobody trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from base.environment import ROOMS
from data.city.config import CityConfig
from data.city.generate import generate
from data.preparing.build import build_index
from models.detectors.build import build_detector
from stages.inputs.weights import save_detector
from tests.models.factory import lidar_config

ROOT = Path(__file__).resolve().parents[2]
TEACHER = lidar_config(voxel={"size": [0.4, 0.4], "max_points": 8, "max_voxels": [10_000, 10_000]})


def make_root(root: Path, train_keyframes: int) -> Path:
    """Fill a folder: two training scenes of `train_keyframes` keyframes, one validation keyframe."""
    for name in ROOMS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    city = CityConfig(
        seed=3,
        train_scenes=2,
        val_scenes=1,
        train_keyframes=train_keyframes,
        val_keyframes=1,
        image=(32, 64),
        sweeps=1,
        azimuths=360,
    )
    generate(city, root / "outputs/city", "v1.0-trainval")
    build_index(root / "outputs/city", "v1.0-trainval", ("train", "val"), root / "outputs/index")
    torch.manual_seed(0)
    save_detector(root / "outputs/teachers/lidar", TEACHER, build_detector(TEACHER).state_dict())
    return root
