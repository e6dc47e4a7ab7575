"""What starts the engine: the Prefect flow and its tasks, deployments, and the command line."""
