"""Who may call, and how much: API keys, their limits, where they are kept."""
