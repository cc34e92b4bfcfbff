"""Text in and out: tokenizer, chat template, prompt limits, incremental detokeniser."""
