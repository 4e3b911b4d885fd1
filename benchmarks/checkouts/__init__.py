"""What `compare_checkouts.py` runs in each checkout: items that note their outputs, and measurements of speed."""
