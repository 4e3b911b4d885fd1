"""Items that `compare_checkouts.py` runs in each checkout, with their outputs, and measurements of speed."""
