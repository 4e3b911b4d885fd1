"""The second recipe world: hundreds of things in two styles and ten hues, at free places and sizes, on patterns."""
