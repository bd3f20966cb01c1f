"""What a run tells: metrics.jsonl, progress on the screen, other monitors, a heartbeat, the summary, tables of results.

And what it is told on the way: files that ask it to save or to stop.
"""

from mpl_scale.monitor.control import ControlFiles, Request
from mpl_scale.monitor.heartbeat import Heartbeat
from mpl_scale.monitor.metrics import MetricsWriter, read_metrics
from mpl_scale.monitor.progress import Progress
from mpl_scale.monitor.summary import (
    command,
    config_hash,
    cost_lines,
    mark_done,
    processor,
    versions,
    write_summary,
)
from mpl_scale.monitor.table import format_table
from mpl_scale.monitor.writers import EventMonitor, Writers

__all__ = [
    "ControlFiles",
    "EventMonitor",
    "Heartbeat",
    "MetricsWriter",
    "Progress",
    "Request",
    "Writers",
    "command",
    "config_hash",
    "cost_lines",
    "format_table",
    "mark_done",
    "processor",
    "read_metrics",
    "versions",
    "write_summary",
]
