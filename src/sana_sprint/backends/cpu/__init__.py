"""For inference on a CPU."""
