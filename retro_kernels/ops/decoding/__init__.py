"""The kernel of decoding: new tokens against the cached neighbours of the chunk each sequence is in."""
