"""Runs in their own processes: start, watch, interrupt and end them, and write their results whatever happens."""

import signal

END_NOW = signal.SIGHUP  # tells the agent of a split run to kill its ranks: nobody else sends it in the agent's session
CHECK_FIT = "check-fit"  # tells the child to refuse a run that would not fit according to its plan
