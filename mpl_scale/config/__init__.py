"""The run's configuration: one JSON with DeepSpeed's keys and an "mpl_scale" section."""

from mpl_scale.config.checks import Batches, check
from mpl_scale.config.load import RunConfig, load_config
from mpl_scale.config.schema import Config

__all__ = ["Batches", "Config", "RunConfig", "check", "load_config"]
