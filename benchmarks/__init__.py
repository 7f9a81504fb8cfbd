"""What `benchmark.py` compares, and the processes in which it runs."""
