"""Tours of every supported call with the clients that people use, each against a running service."""
