"""What a run costs: time, peak memory, memory by category; and running it in a process of its own."""
