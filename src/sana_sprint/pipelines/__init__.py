"""Ready-made pipelines with the published arguments, over one path from a call to pictures."""
