"""Measured arrays in, numbers out: `continual` (forgetting, transfer), `representations` (probes, CKA).."""
