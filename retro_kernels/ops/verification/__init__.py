"""Which backend may be the default on a device: classes of calls, their check, its records, and the verdict."""
