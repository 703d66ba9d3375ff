"""What a compiled program costs, read from it, also for accelerators that are not there."""
