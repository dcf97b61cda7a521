"""What the terms of a variant read of teachers: taps out of stores, and taps of teachers that run in the step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from base.taps import TapRef
from config.sections import tap_kind
from data.reading.batch import collate
from data.store import Store
from models.detectors.detector import Detector
from models.head.targets import TargetEncoder
from stages.teaching.frozen import BATCH
from stages.teaching.kinds import Stored, map_kind
from stages.teaching.serving import box_rows


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
                if not tap_kind(tap).exact:
                    values = maps.double().transpose(0, 1).flatten(1)
                    part = torch.stack([torch.ones_like(values), values, values.square()]).sum(-1)
                    sums[tap] = sums[tap] + part if tap in sums else part
        moments = {tap: (total / count, square / count) for tap, (count, total, square) in sums.items()}
        return {tap: (square - mean**2).clamp(min=0).sqrt().float().cpu() for tap, (mean, square) in moments.items()}


class Sources:
    """Makes of a batch the teacher outputs in its augmented frame.

    Args:
        stores: by name, those that the batch holds cached taps of.
        online: by name of their entry in `stores`, the teachers that run in the step.
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

    def cached(self, taps: Collection[TapRef]) -> set[TapRef]:
        """Of taps those that the batch must hold, because no online teacher makes them."""
        return set(taps) - {TapRef.of(name, tap) for name, teacher in self.online.items() for tap in teacher.taps}

    @torch.no_grad()
    def __call__(self, batch: Any) -> dict[str, Any]:
        """By `TapRef`: maps [B, C, H, W] float32, beside each the cells that have a source under `TapRef.valid`,
        bool [B, 1, H, W], boxes as a list of [K, 11] (box, score, label), and instances as a
        list over the samples of lists over the cameras (data.reading.instances.ImageInstances).
        """
        outputs: dict[str, Any] = {}
        for name, teacher in self.online.items():
            for tap, value in teacher(batch).items():
                ref = TapRef.of(name, tap)
                outputs[ref] = value
                if not tap_kind(tap).exact:
                    outputs[ref.valid] = torch.ones_like(value[:, :1], dtype=torch.bool)
        return outputs | self._from_stores(batch)

    def _from_stores(self, batch: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for name, store in self.stores.items():
            for tap in store.taps:
                ref, kind = TapRef.of(name, tap), map_kind(tap)
                if ref not in batch.teacher:
                    continue
                value = batch.teacher[ref]
                if kind is None:
                    outputs[ref] = value
                    continue
                extent = store.taps[tap].extent or self.extent
                stored = Stored(ref, value, batch.teacher.get(ref.present), store.calibration(tap), extent)
                outputs[ref], outputs[ref.valid] = kind.served(stored, batch.bev_aug, self.extent, self.targets)
        return outputs
