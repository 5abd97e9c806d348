"""`retro-kernels bench`: kinds of work, their alternatives, one runner that checks before it times, and reports."""
