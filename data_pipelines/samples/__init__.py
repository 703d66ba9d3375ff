"""From a pair to named arrays."""
