# Copyright 2026 The clusterformer-hf team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How well clusters agree with true segments: adjusted Rand index, foreground purity, mean best overlap."""

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix


MEASURES = ("adjusted_rand_index", "foreground_purity", "mean_best_overlap")


def cluster_quality(clusters: np.ndarray, segments: np.ndarray) -> dict[str, float]:
    """
    Compares a partition of a picture with its true segments.

    Args:
        clusters (`np.ndarray` of shape `(height, width)`): The cluster of each pixel, whole numbers.
        segments (`np.ndarray` of shape `(height, width)`):
            The true segment of each pixel: 1 and up in the foreground, 0 in the background, which is one segment, and
            negative where it is unknown. Such pixels are left out.

    Returns:
        A dict of
        - `adjusted_rand_index`: the share of pairs of pixels that both partitions put together or both apart, adjusted
          so that chance gives 0 (Hubert and Arabie, 1985); 1 is the same partition. At least -0.5.
        - `foreground_purity`: the share of the foreground's pixels that lie in a cluster most of whose pixels are of
          the same segment, in [0, 1]; `nan` without foreground. A cluster in which the background leads counts as wrong
          for all its foreground.
        - `mean_best_overlap`: mean over the foreground's segments of the intersection over union with the cluster that
          fits best, in [0, 1]; `nan` without foreground.

    Raises:
        `ValueError`: if the shapes differ or no pixel's segment is known.
    """
    if clusters.shape != segments.shape:
        raise ValueError(f"`clusters` of shape {clusters.shape} and `segments` of {segments.shape} do not match.")
    known = segments >= 0
    if not known.any():
        raise ValueError("`segments` is negative at every pixel: there is nothing to compare with.")
    clusters, segments = clusters[known], segments[known]
    counts, is_foreground = contingency_matrix(segments, clusters), np.unique(segments) > 0
    return {
        "adjusted_rand_index": float(adjusted_rand_score(segments, clusters)),
        "foreground_purity": _foreground_purity(counts, is_foreground),
        "mean_best_overlap": _mean_best_overlap(counts, is_foreground),
    }


def _foreground_purity(counts: np.ndarray, is_foreground: np.ndarray) -> float:
    """From the pixels of each segment in each cluster, (segments, clusters)."""
    if not is_foreground.any():
        return float("nan")
    right = counts.max(axis=0)[is_foreground[counts.argmax(axis=0)]]
    return float(right.sum() / counts[is_foreground].sum())


def _mean_best_overlap(counts: np.ndarray, is_foreground: np.ndarray) -> float:
    if not is_foreground.any():
        return float("nan")
    shared = counts[is_foreground]
    union = shared.sum(axis=1, keepdims=True) + counts.sum(axis=0) - shared
    return float((shared / union).max(axis=1).mean())
