"""API keys: recognised in values, which runs write into files that people share, and never printed."""

import os
import re

# What Weights & Biases, Hugging Face and GitHub hand out as keys. 40 hexadecimal digits that are a folder's or a file's
# whole name are a commit, as in Hugging Face's cache.
_KEY = re.compile(r"\b((?<![^/]/)[0-9a-f]{40}|wandb_v\d_\w+|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w+)\b")


def masked(text: str) -> str:
    """The text with `<API key>` for each key in it, and for the values of WANDB_API_KEY and HF_TOKEN."""
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        if key := os.environ.get(name):
            text = text.replace(key, "<API key>")
    return _KEY.sub("<API key>", text)
