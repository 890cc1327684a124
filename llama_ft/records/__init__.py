"""What runs and plans leave behind, each record a dataclass that is written and read in one place."""
