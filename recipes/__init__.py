"""Training recipes that need no download."""
