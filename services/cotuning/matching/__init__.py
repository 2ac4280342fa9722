"""What two models that read the same rows compare to teach each other: the fold, and its rivals on one interface."""
