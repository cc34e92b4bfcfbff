"""Engines: what turns token ids into the next token ids. `base` is the contract."""
