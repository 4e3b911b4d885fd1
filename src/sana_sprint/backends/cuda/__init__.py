"""For CUDA inference: Triton kernels in place of a block's memory-bound operations, and graphs of whole steps.

Nothing here runs unless asked for, and importing this package does not import Triton.
"""
