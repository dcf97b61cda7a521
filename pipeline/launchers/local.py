"""The stage in this process."""

from __future__ import annotations

import logging

from pipeline import gpus
from pipeline.launchers.job import Job

logger = logging.getLogger(__name__)


def run(job: Job) -> int:
    """Run the stage here, on GPUs that nobody else on this host uses; returns its exit code."""
    with gpus.lease(job.gpus, logger.info):
        return job.here()
