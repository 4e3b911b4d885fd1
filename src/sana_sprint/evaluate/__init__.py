"""Scores of pictures: the Frechet distance between two sets, agreement with captions by CLIP, and by a judge."""
