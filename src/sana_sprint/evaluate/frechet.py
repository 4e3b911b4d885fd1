"""The Frechet distance between two sets of feature vectors, each taken as a Gaussian (FID, arXiv 1706.08500).

Pure functions, in fp64. There is no shrinkage of covariances: too few samples are an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D,D), fp64 on the CPU."""

    mean: Tensor
    covariance: Tensor


def fit(features: Tensor) -> Gaussian:
    """The Gaussian with the mean and the unbiased covariance of features (n,D).

    Raises:
        ValueError: a feature is not finite, or n is not above D: then the covariance has directions without variance,
            and the distance says more about n than about the pictures.
    """
    count, size = features.shape
    if not torch.isfinite(features).all():
        raise ValueError("some features are not finite")
    if count <= size:
        raise ValueError(f"{size} features need more than {size} pictures, got: {count}")
    features = features.double().cpu()
    return Gaussian(features.mean(0), features.T.cov())


def distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) for the covariances A and B.

    The trace of (A B)^(1/2) is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), the sum of the roots of its
    eigenvalues.
    """
    root = _root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()  # below zero only by rounding
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float((a.mean - b.mean).square().sum() + trace)


def _root(symmetric: Tensor) -> Tensor:
    """The root of a positive semi-definite matrix."""
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return root
