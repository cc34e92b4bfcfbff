"""Telling a client's server that its job has ended: signed as Standard Webhooks 1.0, at least once."""
