"""Stage `generate`: the synthetic city, a nuScenes dataroot."""

from __future__ import annotations

import logging
import os

from base.progress import ProgressBar
from data.city import CityConfig, generate, plan_scenes
from stages.context import StageContext, StageError

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Generate the city of params.yaml on all cores, scene by scene, and publish it."""
    try:
        config = CityConfig(**context.params.city.model_dump())
    except (TypeError, ValueError) as error:
        raise StageError(str(error)) from error
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
