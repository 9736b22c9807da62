"""Long runs: `make soak`. Each is a module with a command line and writes a JSON file to benchmarks/results."""
