"""Images: how they enter a prompt, and the way from a file's bytes to pixels."""
