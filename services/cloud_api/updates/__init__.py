"""Updates: receiving a part's bytes, admitting it by its header, and the submission."""
