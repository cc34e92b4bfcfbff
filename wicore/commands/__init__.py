"""Groups of the `wicore` command line."""
