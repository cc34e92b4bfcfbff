"""What the service tells of itself: measurements of what workers serve, and traces of single jobs."""
