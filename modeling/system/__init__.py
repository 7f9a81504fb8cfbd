"""Around every process: files, signals, progress bars, errors."""
