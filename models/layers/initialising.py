"""Weights of mmengine's modules at the start."""

from __future__ import annotations

import logging

from mmengine.model import BaseModule


def initialise(*modules: BaseModule) -> None:
    """Initialise the weights of mmengine's modules by their `init_cfg`, which may name a checkpoint."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)  # mmengine reports every parameter
    try:
        for module in modules:
            module.init_weights()
    finally:
        logging.disable(level)
