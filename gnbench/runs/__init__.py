"""A run from its directory to its record: files, lock, signals, progress."""
