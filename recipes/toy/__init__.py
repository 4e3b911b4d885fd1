"""Distillation in the plane, where the exact answer is known."""
