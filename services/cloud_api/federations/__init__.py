"""Federations: which devices train together."""
