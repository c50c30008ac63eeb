"""Random numbers as functions of a name: what is drawn for one purpose never depends on what was drawn before."""

import hashlib

import torch


def generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of `key` (and of the kind of device)."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
