"""Guards taken out of the library by program, one at a time, to see which of them the tests would miss.

`python -m tests.mutants`, or `make mutants`; docs/mutants.md says how to read what comes out.
"""
