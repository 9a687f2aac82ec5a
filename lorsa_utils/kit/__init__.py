"""Everything around the science: commands, notebook runs, claims, published weights, benchmarks, sweeps."""
