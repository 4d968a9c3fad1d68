"""Chat templates and tokenizer facts."""
