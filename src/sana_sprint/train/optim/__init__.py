"""Optimisers and their schedule."""
