"""Writing a model in another framework's format, reading it back, comparing, describing."""
