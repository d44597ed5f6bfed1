"""Latency, power and energy, measured: each figure with its interval, or the reason there is none."""
