"""For CUDA inference: Triton kernels in place of memory-bound operations, and graphs of whole models.

Nothing here runs unless asked for, and importing this package does not import Triton.
"""
