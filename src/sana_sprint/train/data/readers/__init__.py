"""Readers of the formats of data sets."""
