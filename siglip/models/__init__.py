"""The towers. The only folder of siglip that imports flax."""
