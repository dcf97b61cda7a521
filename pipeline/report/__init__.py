"""The report: one self-contained HTML page and a Markdown table over all variants and seeds of a study.

Reads what the evaluation stages published and nothing else: no torch, no data set, no model.
"""

from pipeline.report.build import build
from pipeline.report.efficiency import Pair

__all__ = ["Pair", "build"]
