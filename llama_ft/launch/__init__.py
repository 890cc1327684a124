"""A run in a process of its own: started, watched, interrupted, ended, and its result written whatever happens."""

import signal

END_NOW = signal.SIGHUP  # tells the agent of a split run to kill its ranks: in its session nobody else sends it
CHECK_FIT = "check-fit"  # tells the child to refuse a run that a plan says would not fit
