"""What a vision-language model does with the encoder: two consumers that run on the shipped sample (docs/stage1.md)."""
