"""Everything around the science: commands, runs of the notebooks, claims, published weights, benchmarks, sweeps."""
