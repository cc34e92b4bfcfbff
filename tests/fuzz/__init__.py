"""Requests at random, valid and not, against a whole service, judged by its own description."""
