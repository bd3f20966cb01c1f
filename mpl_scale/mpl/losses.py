"""Cross-entropies of the method. All return one number per row, so that callers weigh and average."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """CE(q, p) of section 2 per row, without the batch average.

    Args:
        logits: [B, K].
        targets: labels int64 [B] or distributions [B, K] (no gradient flows unless they carry one).
        smoothing: mixes the target with the uniform distribution: (1 - s) q + s / K.

    Returns:
        [B].
    """
    return minus_expectation(logits.log_softmax(-1), targets, smoothing=smoothing)


def minus_expectation(values: torch.Tensor, targets: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """-sum_k q_k v_k per row, [B], q the smoothed target of `cross_entropy`: linear in the values [B, K].

    Of log-probabilities it is the cross-entropy, of their derivatives along a direction it is the cross-entropy's.
    """
    hard = targets.ndim == 1
    expected = values.gather(1, targets[:, None])[:, 0] if hard else (targets * values).sum(-1)  # [B]
    if not smoothing:
        return -expected
    return -(1.0 - smoothing) * expected - smoothing * values.mean(-1)


def uda_loss(weak: torch.Tensor, strong: torch.Tensor, *, temperature: float, threshold: float) -> torch.Tensor:
    """Consistency loss of UDA per row: CE(stop_grad(softmax(weak / temperature)), strong), 0 below the threshold.

    The released code's rule: the confidence is that of the sharpened distribution, and masked rows count in the
    average (its denominator is the whole batch).

    Args:
        weak: teacher logits on the weak view [U, K].
        strong: teacher logits on the strong view [U, K].
        temperature: sharpening (Table 7).
        threshold: least confidence, in [0, 1].

    Returns:
        [U].
    """
    target = (weak.detach() / temperature).softmax(-1)  # [U, K]
    confident = target.amax(-1) >= threshold  # bool [U]
    return cross_entropy(strong, target) * confident


def where_unsure(logits: torch.Tensor, targets: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """1 where the probability of the label is at most `threshold`, else 0, [B]: what is left of x_l (C.4).

    The paper masks "the supervised examples with high confidence" and gives no number; UDA's authors compare the
    probability of the right class, and so does this. Masked rows count in the average.

    Args:
        logits: [B, K].
        targets: labels int64 [B].
        threshold: in [0, 1]; 1 leaves none out.
    """
    probability = logits.detach().softmax(-1).gather(1, targets[:, None])[:, 0]  # [B]
    return (probability <= threshold).to(logits.dtype)


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of rows whose largest logit is the target's class (labels [B] or distributions [B, K]); float32 []."""
    labels = targets if targets.ndim == 1 else targets.argmax(-1)  # int64 [B]
    return (logits.argmax(-1) == labels).float().mean()


def sample_labels(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels int64 [B] drawn from softmax(logits [B, K]) by the Gumbel-max rule.

    Args:
        logits: [B, K].
        uniform: independent uniform numbers in (0, 1), [B, K].
    """
    return (F.log_softmax(logits, -1) - torch.log(-torch.log(uniform))).argmax(-1)
