"""What a device and the server do in one round, for each strategy; the same functions in deployment and simulation."""
