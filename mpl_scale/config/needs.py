"""Which optional packages a configuration needs: setting by setting."""

from __future__ import annotations

from mpl_scale.config.load import RunConfig

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": None}
"""The module that each of DeepSpeed's monitors writes with."""


def needed_packages(run: RunConfig, *, engine: str) -> list[tuple[str, str]]:
    """(setting, module) pairs, for packages.require_packages. engine: as resolved.

    What the data set's format needs is said when it is read, which is before the ranks join as well.
    """
    needed = []
    for section, module in MONITORS.items():
        if run.deepspeed.get(section, {}).get("enabled", False):
            setting = f"{section}.enabled = true"
            needed += [(setting, "deepspeed")] if module is None else [(setting, "deepspeed"), (setting, module)]
    if engine == "deepspeed":
        needed.append(("mpl_scale.parallel.engine = deepspeed", "deepspeed"))
    if run.mpl.parallel.recompute_backend == "fairscale":
        needed.append(("mpl_scale.parallel.recompute_backend = fairscale", "fairscale"))
    return needed
