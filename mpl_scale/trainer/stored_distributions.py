"""Write what a network of a checkpoint says of every image of a config's data set: data/distributions.py reads it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mpl_scale.config import RunConfig
from mpl_scale.data import ImageFormat, evaluation_batches
from mpl_scale.data.distributions import account_of, describe_images
from mpl_scale.files import create_array, replace_text, replacing
from mpl_scale.mesh import build_mesh
from mpl_scale.resolve import choose_numerics
from mpl_scale.trainer.preflight import load_splits
from mpl_scale.trainer.stored_network import load_network


@torch.no_grad()
def store_distributions(run: RunConfig, checkpoint: Path, output: Path, *, network: str | None, device: str) -> int:
    """Softmax probabilities of every image as `data.evaluation` sees it, float16 [N, K], published by one rename.

    Images that cannot be read have a uniform row; no split holds them.

    Args:
        run: of the network; its data section names the images, unlabelled ones of another index too.
        checkpoint: a folder step_....
        output: the .npy.
        network: teacher, student or ema; None: the teacher, or the student where there is none.
        device: cpu or cuda.

    Returns:
        The number of images.

    Raises:
        ValueError: as load_splits and load_network, or values that are not probabilities.
    """
    choose_numerics(run.mpl, device)[0].apply(torch.device(device))
    mesh, splits = build_mesh(device=torch.device(device)), load_splits(run)
    _, module = load_network(checkpoint, network, config=run.mpl, mesh=mesh)
    count, classes = len(splits.images), run.mpl.model.num_classes
    ids = np.setdiff1d(np.arange(count, dtype=np.int64), splits.images.refused, assume_unique=True)
    batches = evaluation_batches(
        run.mpl.data,
        replace(splits, test=ids),
        images=ImageFormat(image_size=run.mpl.model.image_size),
        mesh=mesh,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as draft:
        values = create_array(draft, dtype="<f2", shape=(count, classes))
        values[:] = 1.0 / classes
        done = 0
        for images, _, valid in batches:
            probabilities = module(images).float().softmax(1)
            if not torch.isfinite(probabilities).all():
                raise ValueError(f"{checkpoint}: the network's probabilities are NaN; take an earlier checkpoint")
            own = ids[done : done + len(images)]
            good = valid[: len(own)].cpu().numpy()  # rows past the last image are padding
            values[own[good]] = probabilities[: len(own)].cpu().numpy()[good]
            done += len(own)
        values.flush()
        account_of(output).unlink(missing_ok=True)  # of the file that is replaced
        with draft.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    account = {"sha256": digest, "images": describe_images(splits)}
    replace_text(account_of(output), json.dumps(account, indent=1) + "\n")
    return count
