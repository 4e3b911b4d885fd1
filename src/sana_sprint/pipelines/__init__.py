"""Ready-made pipelines with the published arguments, over one shared core."""
