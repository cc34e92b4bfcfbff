"""Gemma 3: hyper-parameters, rotary tables, checkpoints and where they come from."""
