"""The small real corpus of the quick start, with its tokenizer; LICENSE says whose it is."""
