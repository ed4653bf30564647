"""Classification by a linear function of an embedding."""

import numpy as np
from torch import Tensor


def linear_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, seed: int = 0) -> float:
    """Return the share of queries that a logistic regression fitted on the bank classifies right.

    Embeddings are standardized by the bank's mean and deviation first, so that the default regularization means
    the same for every backbone.

    Args:
        bank: embeddings to fit on, shape ``(N, D)``.
        labels: their classes, shape ``(N,)``; at least two different ones.
        queries: embeddings to classify, shape ``(Q, D)``.
        query_labels: their classes, shape ``(Q,)``.
        seed: of the solver.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
    classifier.fit(_numpy(bank), labels.cpu().numpy())
    return float(classifier.score(_numpy(queries), query_labels.cpu().numpy()))


def _numpy(embeddings: Tensor) -> np.ndarray:
    # half-precision embeddings have no numpy type of their own
    return embeddings.detach().float().cpu().numpy()
