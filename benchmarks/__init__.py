"""What `benchmark.py` compares, and the processes it runs in."""
