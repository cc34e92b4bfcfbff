"""OpenAI's batches: files of requests, each line one low-priority job, and files of their answers."""
