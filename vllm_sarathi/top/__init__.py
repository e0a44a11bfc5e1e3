"""WATCHES: what a server shows at /metrics, for a terminal."""
