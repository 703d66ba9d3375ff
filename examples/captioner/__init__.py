"""A PaliGemma-shaped captioner on a frozen encoder, then on one that is trained at a higher resolution."""
