"""What several benchmarks share: Ray, progress, result files and their comparison."""
