"""Triton kernels. They import Triton, and nothing of the models."""
