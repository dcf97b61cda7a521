"""Runs in MLflow: a journal in front of it, and a study's runs."""
