"""The emoji world: captioned scenes of Noto Color Emoji, the small model's training stages, and its judge."""
