"""Model versions and their adapters."""
