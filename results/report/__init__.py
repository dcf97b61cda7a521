"""The report: one self-contained HTML page and a Markdown table over all variants and seeds of a study.

Reads what the evaluation stages published and nothing else: no torch, no data set, no model.
"""
