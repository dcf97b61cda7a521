"""Stage `generate`: the synthetic city, a nuScenes dataroot."""

from __future__ import annotations

import logging
import os

from base.progress import ProgressBar
from data.city.generate import generate, plan_scenes
from stages.context import StageContext

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Generate the city of the parameters on all cores, scene by scene, and publish it."""
    config = context.params.city
    made, total = context.scratch / "city", len(plan_scenes(config, context.params.data.version))
    if not made.exists():  # killed between the last rename and the publication
        with ProgressBar("scenes", total) as bar:
            generate(
                config,
                made,
                context.params.data.version,
                workers=len(os.sched_getaffinity(0)),
                progress=lambda done, name: bar.advance(name, done - bar.done),
                scratch=context.scratch / "scenes",
            )
    logger.info("%d scenes", total)
    context.publish(made, f"outputs/{context.key}")
