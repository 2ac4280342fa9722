"""Programs around the project: environment, secrets, backup, and the test of the deployment."""
