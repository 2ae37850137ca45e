"""How far apart networks are, in weights and in what they do: pure functions, row i against row i.

Legend: n pairs, Q queries, C classes.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from weightspace.networks.behavior import Outputs
from weightspace.networks.checkpoints import Checkpoints, flatten
from weightspace.networks.symmetry import align, groups_of

Array = np.ndarray[Any, Any]


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence KL(first || second) of the class probabilities, in nats.

    Logits [n, Q, C] twice -> [n].
    """
    return _divergence(first.double().log_softmax(-1), second.double().log_softmax(-1)).to(first)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of the class probabilities: logits [n, Q, C] twice -> [n], 0 to ln 2."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((_divergence(p, middle) + _divergence(q, middle)) / 2).to(first)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean over queries of KL(p || q), from log-probabilities [n, Q, C] -> [n]; below zero there is only rounding."""
    return (p.exp() * (p - q)).sum(-1).mean(1).clamp(min=0)


def cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear centered kernel alignment of logits [n, Q, C] twice -> [n], 1 for equal up to rotation and scale.

    Kornblith et al. 2019 (arXiv 1905.00414), equation 4. Networks whose logits do not depend on the query score 0.
    """
    x, y = (logits.double() - logits.double().mean(1, keepdim=True) for logits in (first, second))
    cross, own, other = ((a.transpose(1, 2) @ b).flatten(1).norm(dim=1) for a, b in ((x, y), (x, x), (y, y)))
    return (cross.square() / (own * other).clamp(min=1e-30)).to(first)


COLUMNS = ("L2 of weights", "L2 of weights, aligned", "L2 of probabilities", "worst case", "KL", "JS", "CKA")
"""What `model_distances` gives; all but CKA (a similarity) are 0 for equal networks.

Of networks that represent a signal, values take the place of probabilities, and there are no divergences (NaN).
"""


def model_distances(first: Checkpoints, second: Checkpoints, outputs: Outputs, others: Outputs) -> pd.DataFrame:
    """One row per pair of networks, one column per distance of COLUMNS.

    Args:
        first: n networks.
        second: n networks; "aligned" reorders their units to lie closest to those of the first.
        outputs: of the first on some queries.
        others: of the second on the same queries.
    """
    aligned = flatten(align(second.weights, first.weights, groups_of(first.architecture)))
    flat = first.flat()
    by_query = (outputs.probabilities - others.probabilities).norm(dim=-1)  # [n, Q]
    nothing = torch.full((len(flat),), torch.nan)
    columns = (
        (second.flat() - flat).norm(dim=1),
        (aligned - flat).norm(dim=1),
        by_query.mean(1),
        by_query.amax(1),
        nothing if outputs.real else kl(outputs.logits, others.logits),
        nothing if outputs.real else jensen_shannon(outputs.logits, others.logits),
        cka(outputs.logits, others.logits),
    )
    values = (column.double().cpu().numpy() for column in columns)
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def _p_value(test: Any) -> float:
    return float(test.pvalue)


def paired(differences: Array) -> float:
    """p value of the paired t-test that the mean of some differences is zero; NaN where they do not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly constant differences
        return _p_value(stats.ttest_1samp(differences, 0.0)) if np.ptp(differences) > 0 else float("nan")


def two_sample(first: Array, second: Array) -> tuple[float, float]:
    """p values of Welch's t-test (one mean) and of the Kolmogorov-Smirnov test (one distribution) of two samples.

    The t-test of two constant samples is NaN; the other uses the asymptotic distribution.
    """

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly constant samples, whose p value is what it is
        varied = max(np.ptp(first), np.ptp(second)) > 0
        t_test = _p_value(stats.ttest_ind(first, second, equal_var=False)) if varied else np.nan
        return t_test, _p_value(stats.ks_2samp(first, second, method="asymp"))
