"""The orders between streams on a real GPU: `make gpu`. Without one, every test here is skipped, and says so.

`machine.py` gives streams, delays and order; `programs.py` and `random_programs.py` run on it. They run on a CPU too
(`tests/test_gpu_programs.py`), so that what fails on a GPU is the device's order and not the programs.
"""
