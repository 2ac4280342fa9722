"""Metrics as `evaluate.Metric` modules, used by their classes: nothing is downloaded and no file is written."""
