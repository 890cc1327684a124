"""A run in a process of its own: started, watched, interrupted, ended, and its result written whatever happens."""

CHECK_FIT = "check-fit"  # tells the child to refuse a run that a plan says would not fit
