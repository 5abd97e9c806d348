"""Which backend may be the default on a device: classes of calls, the check of a class, its records, and the verdict."""
