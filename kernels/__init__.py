"""The log-probability kernels: see logps.py."""
