"""What is optimised and how: the objective, the step, the loop, and everything a run is configured by."""
