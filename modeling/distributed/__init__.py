"""Several processes that work together, through torch.distributed: how they meet, share the work and end."""
