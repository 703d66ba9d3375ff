"""What a run will cost, before any accelerator is rented."""
