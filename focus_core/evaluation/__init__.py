"""Measure an engine and its baselines on the paper's tasks."""
