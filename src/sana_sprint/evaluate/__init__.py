"""Scores of pictures: Frechet distance between two sets, CLIP score, and compositional correctness by a judge."""
