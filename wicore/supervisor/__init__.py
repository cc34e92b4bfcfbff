"""Running the processes of a service: start, restart, ordered stop, and no orphan left behind."""
