"""Stage `prepare`: the tables of a nuScenes dataroot -> one Arrow index, every file that it names checked."""

from __future__ import annotations

import logging

from data.preparing.build import Summary, build_index
from stages.context import INDEX, StageContext

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Build the index of the splits in the parameters and publish it."""
    data, made = context.params.data, context.scratch / "index"
    summary = build_index(
        context.root / data.dataroot,
        data.version,
        [split for split in data.splits.model_dump().values() if split],
        made,
        skip_broken=data.skip_broken,
        sweeps=context.params.input.sweeps,
        radar=context.params.input.radar,
    )
    _report(summary)
    context.publish(made, INDEX)


def _report(summary: Summary) -> None:
    """Say what the index holds, and what it had to leave out."""
    for split, samples in summary.samples.items():
        logger.info("%s: %d keyframes of %d scenes", split, samples, summary.scenes[split])
    logger.info("%d boxes of the ten classes", summary.boxes)
    for split, skipped in summary.skipped.items():
        for token, reason in skipped.items():
            logger.warning("left out of %s: sample %s: %s", split, token, reason)
