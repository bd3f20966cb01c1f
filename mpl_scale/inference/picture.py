"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MOST_NAMED, _MOST_NUMBERED = 60, 20


def draw_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Shares of each label's images by predicted class, as a PNG.

    Args:
        confusion: int64 [K, K], images by label and prediction.
        names: of the classes; written up to 60 of them, and the shares up to 20.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = 100 * confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = min(12.0, 3.0 + 0.35 * len(names))
    figure, axes = pyplot.subplots(figsize=(side, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title("% of each label's images")
    if len(names) <= _MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _MOST_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "white" if share > 50 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
