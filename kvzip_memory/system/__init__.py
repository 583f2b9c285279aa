"""Processes, threads, locks, files and logs: what every room stands on. Knows nothing of models or contexts."""
