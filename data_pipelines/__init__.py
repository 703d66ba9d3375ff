"""Image-text pairs in, numpy batches out. Knows neither jax nor siglip."""
