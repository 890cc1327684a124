"""A run in a process of its own: started, watched, interrupted, ended, and its result written whatever happens."""

import signal

END_NOW = (
    signal.SIGHUP
)  # tells the agent of a split run to kill its ranks; nobody else sends it in a session of our own
CHECK_FIT = "check-fit"  # tells the child to refuse a run that a plan says would not fit
