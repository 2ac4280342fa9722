"""Rounds of a run, as operators see them."""
