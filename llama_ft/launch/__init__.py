"""A run in a process of its own: started, watched, interrupted, ended, and its result written whatever happens."""
