"""The engines and base images of `make compose-test`."""
