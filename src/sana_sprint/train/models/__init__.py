"""Models that exist in training only."""
