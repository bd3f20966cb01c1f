"""What a run tells: metrics.jsonl, the progress on the screen, other monitors, the summary and tables of results."""

from mpl_scale.monitor.metrics import MetricsWriter, read_metrics
from mpl_scale.monitor.progress import Progress
from mpl_scale.monitor.summary import config_hash, mark_done, versions, write_summary
from mpl_scale.monitor.table import format_table
from mpl_scale.monitor.writers import EventMonitor, Writers

__all__ = [
    "EventMonitor",
    "MetricsWriter",
    "Progress",
    "Writers",
    "config_hash",
    "format_table",
    "mark_done",
    "read_metrics",
    "versions",
    "write_summary",
]
