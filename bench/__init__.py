"""Time, memory and FLOPs of the project beside what one would otherwise use. docs/bench.md says how it measures."""
