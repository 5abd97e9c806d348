"""Where retrieval computes: the argument `device`, checked before anything is loaded."""

from __future__ import annotations

import torch

from ...errors import DatabaseError


def find_device(device: str | torch.device) -> torch.device:
    """-> the device of this name; "auto" is a GPU where torch sees one, else the CPU.

    Raises ValueError for what is no name of a device, DatabaseError for a GPU that torch does not see."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: got {device!r}; expected 'cpu', 'cuda', 'cuda:1' and so on, or 'auto'") from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise DatabaseError(
                f"device: got {str(device)!r}, but torch sees no GPU: name 'cpu', or install torch with CUDA"
            )
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise DatabaseError(
                f"device: got {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs, numbered from 0"
            )
    return found


def check_memory(device: torch.device, needed: int, what: str, advice: str) -> None:
    """Raises DatabaseError where `what`, of `needed` bytes, is more than a GPU has free."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise DatabaseError(f"device: {what} take {needed:,} bytes, {device} has {free:,} free: {advice}")
