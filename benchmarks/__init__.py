"""Measurements that are not shipped: the GPU run, whole models, retrieval, rates, overhead; and their results."""
