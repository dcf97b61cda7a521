"""What the terms of a variant read of teachers: taps out of stores, and taps of teachers that run in the step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from config.params import EXACT_TAPS
from data.reading.batch import collate
from data.store import Store
from models.detectors.detector import Detector
from models.head.targets import TargetEncoder
from stages.teaching.frozen import BATCH
from stages.teaching.serving import box_rows, serve_head, serve_maps


class OnlineTeacher:
    """A frozen teacher that runs on the student's own batch: no warp, no encoding, every cell has a source.

    It sees the batch as the student's dataset gives it: points in the augmented frame, cropped to the grid after the
    augmentation, and images as the student's augmentation made them.

    It is no part of what trains: it is in evaluation mode, without gradients, in no checkpoint and no optimiser.
    """

    def __init__(self, detector: Detector, taps: Collection[str], score_threshold: float, device: torch.device) -> None:
        """Freeze a detector.

        Args:
            detector: the teacher.
            taps: that terms read.
            score_threshold: of the boxes that are kept.
            device: of the batches.
        """
        self.detector = detector.to(device).eval().requires_grad_(False)
        self.taps, self.score_threshold, self.device = sorted(taps), score_threshold, device

    @torch.no_grad()
    def __call__(self, batch: Any) -> dict[str, Any]:
        """By tap: maps [B, C, H, W] float32, boxes as a list of [K, 11] (box, score, label).

        Raises:
            ValueError: the detector lacks a tap.
        """
        # Not in the step's bfloat16: extraction runs in float32, and the two ways to serve a tap must agree.
        with torch.autocast(self.device.type, enabled=False):
            prediction = self.detector(batch, self.taps)
            outputs: dict[str, Any] = {tap: maps.float() for tap, maps in prediction.taps.items()}
            if "boxes" in self.taps:
                found = self.detector.decode(prediction)
                outputs["boxes"] = [box_rows(sample, self.score_threshold) for sample in found]
        return outputs

    def std(self, dataset: Dataset[Any], rows: Sequence[int]) -> dict[str, Tensor]:
        """Standard deviation [C] of each dense tap's channels over all cells of some samples, as a store has it of all.

        Args:
            dataset: not augmented, with what the teacher reads.
            rows: which samples.
        """
        sums: dict[str, Tensor] = {}  # by tap [3, C]: cells, sum, sum of squares
        for batch in DataLoader(Subset(dataset, rows), BATCH, collate_fn=collate):
            for tap, maps in self(batch.to(self.device)).items():
                if tap != "boxes":
                    values = maps.double().transpose(0, 1).flatten(1)
                    part = torch.stack([torch.ones_like(values), values, values.square()]).sum(-1)
                    sums[tap] = sums[tap] + part if tap in sums else part
        moments = {tap: (total / count, square / count) for tap, (count, total, square) in sums.items()}
        return {tap: (square - mean**2).clamp(min=0).sqrt().float().cpu() for tap, (mean, square) in moments.items()}


class Sources:
    """Makes of a batch the teacher outputs in its augmented frame.

    Args:
        stores: by name, those that the batch holds cached taps of.
        online: by name of their entry in `stores` of params.yaml, the teachers that run in the step.
        extent: half the side of the student's grid in metres.
        targets: of the student; cached head maps are moved by them.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        online: Mapping[str, OnlineTeacher],
        extent: float,
        targets: TargetEncoder | None = None,
    ) -> None:
        self.stores, self.online, self.extent, self.targets = dict(stores), dict(online), extent, targets

    def cached(self, taps: Collection[str]) -> set[str]:
        """Of `<store>.<tap>` those that the batch must hold, because no online teacher makes them."""
        return set(taps) - {f"{name}.{tap}" for name, teacher in self.online.items() for tap in teacher.taps}

    @torch.no_grad()
    def __call__(self, batch: Any) -> dict[str, Any]:
        """By `<store>.<tap>`: maps [B, C, H, W] float32, beside each the cells that have a source as
        `<store>.<tap>.valid` bool [B, 1, H, W], boxes as a list of [K, 11] (box, score, label), and instances as a
        list over the samples of lists over the cameras (data.reading.instances.ImageInstances).
        """
        outputs: dict[str, Any] = {}
        for name, teacher in self.online.items():
            for tap, value in teacher(batch).items():
                outputs[f"{name}.{tap}"] = value
                if tap != "boxes":
                    outputs[f"{name}.{tap}.valid"] = torch.ones_like(value[:, :1], dtype=torch.bool)
        return outputs | self._from_stores(batch)

    def _from_stores(self, batch: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for name, value in batch.teacher.items():
            store, _, tap = name.partition(".")
            if tap in EXACT_TAPS:
                outputs[name] = value
            elif not tap.endswith(".present"):
                outputs[name], outputs[f"{name}.valid"] = self._dense(self.stores[store], tap, name, batch)
        return outputs

    def _dense(self, store: Store, tap: str, name: str, batch: Any) -> tuple[Tensor, Tensor]:
        """Maps of a store's tap and the cells that have a source."""
        values, present = batch.teacher[name], batch.teacher.get(f"{name}.present")
        calibration, reach = store.calibration(tap), store.taps[tap].extent or self.extent
        if tap != "head":
            return serve_maps(values, present, calibration, reach, batch.bev_aug, self.extent)
        if self.targets is None:
            raise ValueError(f"{name} is a cached head map: its boxes are moved by the student's targets, give them")
        return serve_head(values, calibration, reach, batch.bev_aug, self.targets)
