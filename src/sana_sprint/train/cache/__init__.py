"""Results computed once and kept on disk."""
