"""Which pair comes at which position of the stream, by arithmetic alone."""
