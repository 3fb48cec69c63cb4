"""Many prompts: planned, sharded, killable; in one process, several, or a share of them."""

from tl_neuron_attr.runs.differences import RunDifference, diff_runs
from tl_neuron_attr.runs.progress import Progress, line_report
from tl_neuron_attr.runs.ranks import Share, share_of_environment
from tl_neuron_attr.runs.run import run_prompts
from tl_neuron_attr.runs.saved import Run, load_run
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.stopping import Stopped
from tl_neuron_attr.runs.summary import Summary
from tl_neuron_attr.runs.upgrade import upgrade_run

__all__ = [
    "Progress",
    "Run",
    "RunDifference",
    "RunSettings",
    "Share",
    "Stopped",
    "Summary",
    "diff_runs",
    "line_report",
    "load_run",
    "run_prompts",
    "share_of_environment",
    "upgrade_run",
]
