"""To and from diffusers."""
