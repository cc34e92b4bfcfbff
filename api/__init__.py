"""The HTTP and websocket front end: each door reduces its request to a job and delivers its events."""
