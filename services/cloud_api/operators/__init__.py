"""Operators: their API keys."""
