"""Training: each stage is one TOML file, resumable, with samples and a loss log as it goes."""
